"""Changes to encoders that are there: the layers of another one, another input size, additions to their tokens."""

from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.data2vec2_checkpoints import POSITIONS
from emkum.models.encoder import Encoder, LayerChoice
from emkum.models.timm_encoder import TimmImageEncoder
from emkum.weights import load_strictly

# What users of encoders ask for beside what Encoder declares.
_ATTRIBUTES = ("width", "num_layers", "num_heads", "image_size", "mean", "std", "vocab_size", "max_positions")


def copy_layers(target: Encoder, source: Encoder, name: str, choice: LayerChoice | None = None) -> None:
    """Give an encoder the weights of another one of its kind, which may have more layers or a larger vocabulary.

    Positions that are fixed stay the target's own where the input sizes differ. Of a larger vocabulary, the first rows
    are taken.

    Args:
        target: receives the weights.
        source: has them.
        name: where they come from, for messages.
        choice: layers of the source that become the target's; None = as many of the first ones.

    Raises:
        UserError: the source has fewer layers or words, or other parameters.
    """
    kept = (choice or LayerChoice(target.num_layers)).indices(source.num_layers, name)
    if len(kept) != target.num_layers:
        raise UserError(f"{len(kept)} layers of {name} are chosen for an encoder of {target.num_layers}")
    theirs = source.all_blocks()
    for block, index in zip(target.all_blocks(), kept, strict=True):
        load_strictly(block, theirs[index].state_dict(), name, what="the encoder's blocks")
    own, rest = _outside_blocks(target), _outside_blocks(source)
    words = {id(parameter) for parameter in source.embedding_parameters()}
    for key in own.keys() & rest.keys():
        if key.endswith(POSITIONS["IMAGE"]) and own[key].shape != rest[key].shape:
            rest[key] = own[key]
        elif id(rest[key]) in words and rest[key].ndim == 2:
            rest[key] = rest[key][: len(own[key])]
    blocks = {key: value for key, value in target.state_dict().items() if key not in own}
    load_strictly(target, blocks | rest, name, what="the encoder")


def _outside_blocks(encoder: Encoder) -> dict[str, Tensor]:
    """Parameters and buffers that are in no block, by name."""
    inside = {id(value) for block in encoder.all_blocks() for value in block.state_dict(keep_vars=True).values()}
    return {key: value for key, value in encoder.state_dict(keep_vars=True).items() if id(value) not in inside}


def resize_timm_encoder(encoder: TimmImageEncoder, image_size: int, name: str) -> None:
    """Interpolate the tables of positions for another input size.

    Raises:
        UserError: the patches do not divide it.
    """
    patch = encoder.model.patch_embed.patch_size[0]
    if image_size < 1 or image_size % patch:
        raise UserError(f"images of {image_size} pixels are no multiple of the {patch}-pixel patches of {name}")
    encoder.model.set_input_size(img_size=(image_size, image_size))
    encoder.image_size = image_size


class WithAdditions(Encoder):
    """An encoder with what a student adds to the tokens before the first block.

    Args:
        encoder: the encoder.
        additions: modules that take tokens and token type, in their order.
        token_type: of the encoder's modality.
    """

    def __init__(self, encoder: Encoder, additions: nn.ModuleDict, token_type: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.additions = additions
        self.token_type = token_type
        for name in _ATTRIBUTES:
            if hasattr(encoder, name):
                setattr(self, name, getattr(encoder, name))

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """See Encoder."""
        tokens = self.encoder.embed(inputs, masked, mask_token)
        for addition in self.additions.values():
            tokens = addition(tokens, self.token_type)
        return tokens

    def encode(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """See Encoder."""
        return self.encoder.encode(tokens, padding_mask)

    def all_blocks(self) -> list[nn.Module]:
        """See Encoder."""
        return self.encoder.all_blocks()

    def embedding_parameters(self) -> list[nn.Parameter]:
        """See Encoder."""
        return self.encoder.embedding_parameters()

    def block_state(self, index: int) -> dict[str, Tensor]:
        """See Encoder."""
        return self.encoder.block_state(index)

    def drop_last_blocks(self, count: int) -> None:
        """See Encoder."""
        self.encoder.drop_last_blocks(count)
        self.num_layers = self.encoder.num_layers

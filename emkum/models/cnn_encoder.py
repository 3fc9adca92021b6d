"""timm's convolutional networks as image encoders."""

import re

import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.encoder import Encoder
from emkum.weights import first_line, timm_model

_SUPPORTED = "choose a convolutional network such as a ResNet, ConvNeXt, EfficientNet or RegNet"


class CnnImageEncoder(Encoder):
    """A timm network's last map of features as tokens, row by row, behind their mean, which serves as CLS token.

    `embed` is the whole network; there is nothing left for `encode`.

    Args:
        name: timm's model name; its `forward_features` gives a (B, C, H, W) map.
        weights: local file, `hub`, or empty for random weights.
        image_size: side of the input in pixels.

    Attributes:
        width: channels C. num_layers: stages. num_heads: 0. image_size: as given. mean, std: what images are normalized
        with, per channel on a scale from 0 to 1.

    Raises:
        UserError: the model gives no such map, or timm does not tell its stages.
    """

    def __init__(self, name: str, weights: str = "", image_size: int = 224) -> None:
        super().__init__()
        self.model = timm_model(name, weights, num_classes=0)
        self.name = name
        self._checkpoints = False
        self._probe(image_size)
        self._stage_names, self._stem_names = _stages_and_stem(self.model, name)
        self.image_size = image_size
        self.width: int = self.model.num_features
        self.num_layers = len(self._stage_names)
        self.num_heads = 0
        self.mean: tuple[float, ...] = tuple(self.model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(self.model.pretrained_cfg["std"])

    @property
    def checkpoint_activations(self) -> bool:
        """Recompute what timm recomputes of this network; statistics of BatchNorm are then updated twice a step."""
        return self._checkpoints

    @checkpoint_activations.setter
    def checkpoint_activations(self, enabled: bool) -> None:
        try:
            self.model.set_grad_checkpointing(enabled)
        except (AssertionError, AttributeError):
            raise UserError(f"timm's {self.name} cannot recompute its activations: keep them") from None
        self._checkpoints = enabled

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 1 + H * W, C) of (B, 3, S, S) images: the mean, then the map.

        Raises:
            ValueError: `masked` is given.
        """
        if masked is not None:
            raise ValueError("a CNN has no patch embedding that could be masked")
        features = self.model.forward_features(inputs).flatten(2).transpose(1, 2)
        return torch.cat([features.mean(1, keepdim=True), features], dim=1)

    def encode(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The tokens as they are."""
        return tokens

    def all_blocks(self) -> list[nn.Module]:
        """The stages in their order."""
        return [self.model.get_submodule(name) for name in self._stage_names]

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of the stem, its norms included."""
        return [self.model.get_parameter(name) for name in self._stem_names]

    def block_state(self, index: int) -> dict[str, Tensor]:
        """Refused with a UserError: stages are no Transformer blocks."""
        raise self._no_blocks()

    def drop_last_blocks(self, count: int) -> None:
        """Refused with a UserError: stages are no Transformer blocks."""
        raise self._no_blocks()

    def _no_blocks(self) -> UserError:
        return UserError(f"timm's {self.name}: a CNN has no Transformer blocks")

    def _probe(self, image_size: int) -> None:
        """Run the network once: is it of the right kind, and which parts of it are there for a classifier alone?"""
        called: set[nn.Module] = set()
        hooks = [
            module.register_forward_hook(lambda module, inputs, output: called.add(module))
            for module in self.model.modules()
        ]
        self.model.eval()
        try:
            with torch.no_grad():
                image = next(self.model.parameters()).new_zeros(1, 3, image_size, image_size)
                features = self.model.forward_features(image)
        except Exception as error:  # networks of other kinds fail in a dozen ways
            raise UserError(self._no_map(image_size, f": {first_line(error)[:120]}")) from None
        finally:
            self.model.train()
            for hook in hooks:
                hook.remove()
        if features.ndim != 4 or features.shape[1] != self.model.num_features:
            raise UserError(self._no_map(image_size, ""))
        # Parameters without a gradient would make distributed training fail.
        for name, child in list(self.model.named_children()):
            if called.isdisjoint(child.modules()):
                setattr(self.model, name, nn.Identity())

    def _no_map(self, image_size: int, why: str) -> str:
        return f"timm's {self.name} gives no map of features of {image_size}-pixel images{why}; {_SUPPORTED}"


def _stages_and_stem(model: nn.Module, name: str) -> tuple[list[str], list[str]]:
    """Names of the stages and of the stem's parameters, by the patterns that timm groups parameters with."""
    patterns = model.group_matcher(coarse=True) if hasattr(model, "group_matcher") else {}
    if not isinstance(patterns, dict):  # a function of names, in a few models without stages
        patterns = {}
    blocks, stem = patterns.get("blocks"), patterns.get("stem")
    if isinstance(blocks, list):  # a pattern of the stages, then one of what follows them
        blocks = blocks[0][0]
    stages = [key for key, _ in model.named_modules() if isinstance(blocks, str) and re.fullmatch(blocks, key)]
    if not stages or not isinstance(stem, str):
        raise UserError(f"timm does not tell the stages of {name}; {_SUPPORTED}")
    return stages, [key for key, _ in model.named_parameters() if re.match(stem, key)]

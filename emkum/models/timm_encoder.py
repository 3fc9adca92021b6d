"""timm's Vision Transformers as image encoders."""

from collections.abc import Iterator

import numpy as np
import torch
from timm.layers import DropPath, PatchEmbed
from timm.models import beit, deit, vision_transformer
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.models.encoder import Encoder, LayerChoice
from emkum.weights import timm_model

# Subclasses of the first would have embeddings of their own.
_MODELS = (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, beit.Beit)
_BLOCKS = (vision_transformer.Block, beit.Block)
_SUPPORTED = "choose a ViT (also of AugReg, CLIP, DeiT, DeiT-3, DINO or DINOv2) or a BEiT"
_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


class TimmImageEncoder(Encoder):
    """Blocks of a timm ViT or BEiT, without its final norm and classifier.

    Register and distillation tokens take part in the blocks, but are neither in what `embed` gives nor in what `encode`
    does: there, the patches follow the CLS token row by row.

    Args:
        name: timm's model name; a ViT or BEiT with a CLS token.
        weights: local file, `hub`, or empty for random weights; tables of positions are interpolated to `image_size`.
        image_size: side of the input in pixels, a multiple of the model's patches.
        choice: which blocks to keep; None = all.
        drop_path: stochastic depth rate of the last block, growing linearly from 0.
        own_positions: False = without the model's table of positions and BEiT's tables of relative positions.
        fused_attention: use PyTorch's fused attention kernels instead of plain matrix products.

    Attributes:
        width: D. num_layers, num_heads: of the kept blocks. image_size: as given. mean, std: what images are normalized
        with, per channel on a scale from 0 to 1.

    Raises:
        UserError: the model is of another kind, has fewer blocks than are chosen, or patches that do not divide
            `image_size`.
    """

    def __init__(
        self,
        name: str,
        weights: str = "",
        image_size: int = 224,
        choice: LayerChoice | None = None,
        drop_path: float = 0.0,
        own_positions: bool = True,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        model = _supported_model(name, weights, image_size)
        kept = (choice or LayerChoice()).indices(len(model.blocks), f"timm's {name}")
        model.blocks = nn.ModuleList(model.blocks[index] for index in kept)
        _remove_what_follows(model)
        if not own_positions:
            _remove_positions(model)
        for block in model.blocks:
            block.attn.fused_attn = fused_attention
        self.model = model
        self.name = name
        self.image_size = image_size
        self.width: int = model.embed_dim
        self.num_layers = len(kept)
        self.num_heads: int = model.blocks[0].attn.num_heads
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])
        self._only_patches_have_positions: bool = getattr(model, "no_embed_class", False)
        # Not timm's own rates: it spreads them over all blocks, so that the last kept one would fall short.
        for block, rate in zip(model.blocks, np.linspace(0, drop_path, len(kept)), strict=True):
            if rate > 0:
                block.drop_path1, block.drop_path2 = DropPath(float(rate)), DropPath(float(rate))

    def embed(self, inputs: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 1 + N, D) of (B, 3, S, S) images, see Encoder.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        if inputs.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {tuple(inputs.shape[-2:])} pixels, not {self.image_size} by {self.image_size}")
        patches = self.model.patch_embed(inputs)
        if patches.ndim == 4:  # (B, rows, columns, D) in models of any input size
            patches = patches.flatten(1, 2)
        if masked is not None:
            patches = torch.where(masked[..., None], mask_token.to(patches.dtype), patches)
        cls_token = self.model.cls_token.expand(len(patches), -1, -1)
        table = self.model.pos_embed
        if table is None:
            return torch.cat([cls_token, patches], dim=1)
        if self._only_patches_have_positions:
            return torch.cat([cls_token, patches + table], dim=1)
        further = table.shape[1] - 1 - patches.shape[1]
        return torch.cat([cls_token + table[:, :1], patches + table[:, 1 + further :]], dim=1)

    def encode(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 1 + N, D) from `embed` through all blocks.

        Raises:
            ValueError: a padding mask, which images do not have.
        """
        return self._without_registers(super().encode(tokens, padding_mask))

    def hidden_states(self, inputs: Tensor, padding_mask: Tensor | None = None) -> list[Tensor]:
        """(B, 1 + N, D) behind every block; arguments as of `forward`."""
        return [self._without_registers(state) for state in self._run(self.embed(inputs), padding_mask)]

    def all_blocks(self) -> list[nn.Module]:
        """The kept blocks in their order."""
        return list(self.model.blocks)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Those of the patch embedding."""
        return list(self.model.patch_embed.parameters())

    def block_state(self, index: int) -> dict[str, Tensor]:
        """See Encoder. Relative positions are left out, and a bias that the block lacks is zero.

        Raises:
            UserError: the block has other parameters than timm's ViT block.
        """
        state = {name: value.detach() for name, value in self.model.blocks[index].named_parameters()}
        state.pop("attn.relative_position_bias_table", None)
        if "attn.q_bias" in state:
            query, value = state.pop("attn.q_bias"), state.pop("attn.v_bias")
            state["attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        for branch, scales in (("attn.proj", ("ls1.gamma", "gamma_1")), ("mlp.fc2", ("ls2.gamma", "gamma_2"))):
            for scale in (state.pop(name) for name in scales if name in state):
                state[f"{branch}.weight"] = state[f"{branch}.weight"] * scale[:, None]
                state[f"{branch}.bias"] = state[f"{branch}.bias"] * scale
        if "attn.qkv.weight" in state and "attn.qkv.bias" not in state:
            state["attn.qkv.bias"] = state["attn.qkv.weight"].new_zeros(len(state["attn.qkv.weight"]))
        names = {f"{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")}
        if names != state.keys():
            differing = ", ".join(sorted(names ^ state.keys()))
            raise UserError(f"no other block can start from those of timm's {self.name}: they differ in {differing}")
        return state

    def drop_last_blocks(self, count: int) -> None:
        """Take the last blocks off; those that are left keep their rates of stochastic depth."""
        self.num_layers -= count
        self.model.blocks = self.model.blocks[: self.num_layers]

    def _run(self, tokens: Tensor, padding_mask: Tensor | None) -> Iterator[Tensor]:
        """What each block gives, register tokens included."""
        if padding_mask is not None:
            raise ValueError("images have no padding")
        x, registers = tokens, self._registers()
        if registers is not None:
            x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = self.model.norm_pre(x)
        bias = () if getattr(self.model, "rel_pos_bias", None) is None else (self.model.rel_pos_bias(),)
        for block in self.model.blocks:
            x = self._call(block, x, *bias)
            yield x

    def _without_registers(self, tokens: Tensor) -> Tensor:
        registers = self._register_token()
        if registers is None:
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, 1 + registers.shape[1] :]], dim=1)

    def _registers(self) -> Tensor | None:
        """(1, R, D) tokens behind the CLS token, with their positions."""
        token = self._register_token()
        if token is None or self.model.pos_embed is None or self._only_patches_have_positions:
            return token
        return token + self.model.pos_embed[:, 1 : 1 + token.shape[1]]

    def _register_token(self) -> Tensor | None:
        """(1, R, D), without positions."""
        found = (getattr(self.model, name, None) for name in ("reg_token", "dist_token"))
        return next((token for token in found if token is not None), None)


def _supported_model(name: str, weights: str, image_size: int) -> nn.Module:
    try:
        model = timm_model(name, weights, img_size=image_size, num_classes=0)
    except TypeError:
        raise UserError(f"timm's {name} is no Vision Transformer: it takes no image size; {_SUPPORTED}") from None
    if type(model) not in _MODELS or type(model.patch_embed) is not PatchEmbed:
        raise UserError(f"timm's {name}, a {type(model).__name__}, is not supported; {_SUPPORTED}")
    if model.cls_token is None:
        raise UserError(f"timm's {name} has no CLS token; {_SUPPORTED}")
    if not all(type(block) in _BLOCKS for block in model.blocks):
        raise UserError(f"timm's {name} has blocks that are not supported; {_SUPPORTED}")
    patch_size = model.patch_embed.patch_size[0]
    if image_size < 1 or image_size % patch_size:
        raise UserError(f"--image-size {image_size} is no multiple of the {patch_size}-pixel patches of timm's {name}")
    return model


def _remove_what_follows(model: nn.Module) -> None:
    """Parameters without a gradient would make distributed training fail."""
    model.norm = model.fc_norm = nn.Identity()
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None
    # BEiT has none before its blocks.
    if not hasattr(model, "norm_pre"):
        model.norm_pre = nn.Identity()


def _remove_positions(model: nn.Module) -> None:
    model.pos_embed = None
    if isinstance(model, beit.Beit):
        model.rel_pos_bias = None
        for block in model.blocks:
            block.attn.window_size = block.attn.relative_position_bias_table = None

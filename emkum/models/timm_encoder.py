"""The first blocks of a timm Vision Transformer as image encoder."""

import numpy as np
from timm.layers import DropPath
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.outputs import Encoded
from emkum.weights import timm_model


class TimmImageEncoder(nn.Module):
    """First `num_layers` blocks of a timm ViT, without its final norm and classifier.

    Args:
        name: timm's model name; the model must be a plain ViT (patch embedding, CLS token, `blocks`).
        weights: local file, `hub`, or empty for random weights; position tables are interpolated to `image_size`.
        image_size: side of the input in pixels.
        num_layers: blocks to keep; 0 = all.
        drop_path: stochastic depth rate of the last kept block.

    Raises:
        UserError: the model is no such ViT, or has fewer blocks.
    """

    def __init__(
        self, name: str, weights: str = "", image_size: int = 224, num_layers: int = 0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        try:
            model = timm_model(name, weights, img_size=image_size, num_classes=0)
        except TypeError:
            raise UserError(f"timm's {name} is no Vision Transformer: it takes no image size") from None
        if not hasattr(model, "blocks") or getattr(model, "cls_token", None) is None:
            raise UserError(f"timm's {name} has no blocks or no CLS token; choose a ViT, DeiT or BEiT")
        if num_layers > len(model.blocks):
            raise UserError(f"timm's {name} has {len(model.blocks)} blocks, fewer than the {num_layers} asked for")
        if num_layers:
            model.blocks = model.blocks[:num_layers]
        # Not timm's own rates: it spreads them over all blocks, so that the last kept one would fall short.
        for block, rate in zip(model.blocks, np.linspace(0, drop_path, len(model.blocks)), strict=True):
            if rate > 0:
                block.drop_path1, block.drop_path2 = DropPath(float(rate)), DropPath(float(rate))
        model.norm = nn.Identity()
        self.model = model
        self.width: int = model.embed_dim
        self.num_layers = len(model.blocks)
        self.num_heads: int = model.blocks[0].attn.num_heads
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])

    def forward(self, images: Tensor) -> Encoded:
        """(B, 3, S, S) normalized images to tokens (B, 1 + N, D)."""
        return Encoded(self.model.forward_features(images))

"""fairseq's own Data2Vec 2, trained on images alone: a way to make an image teacher from scratch."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
import torch.distributed as dist
from fairseq.dataclass import FairseqDataclass
from fairseq.models import register_model
from omegaconf import II
from torch import Tensor

from emkum.errors import UserError
from emkum.layers.precision import AUTOCAST_HELP, Autocast
from emkum.models.data2vec2 import IMAGENET_MEAN, IMAGENET_STD, data2vec2_module
from emkum.options import collect_parts

from ..config import flat_dataclass

_Data2VecMultiModel = data2vec2_module("models.data2vec2").Data2VecMultiModel
# Raised by fairseq's own call, at every checkpoint.
warnings.filterwarnings(
    "ignore", "Positional args are being deprecated", FutureWarning, _Data2VecMultiModel.__module__.replace(".", r"\.")
)


@dataclass
class Data2Vec2Config:
    """Defaults are those of the released base model (`base_images_only_task.yaml`)."""

    embed_dim: int = field(default=768, metadata={"help": "width of the encoder"})
    depth: int = field(default=10, metadata={"help": "main blocks"})
    prenet_depth: int = field(default=2, metadata={"help": "blocks before them, without targets of their own"})
    num_heads: int = field(default=12, metadata={"help": "attention heads"})
    input_size: int = field(default=224, metadata={"help": "side of the input in pixels"})
    patch_size: int = field(default=16, metadata={"help": "side of a patch in pixels"})
    mask_prob: float = field(default=0.8, metadata={"help": "part of the patches that the student does not see"})
    mask_prob_adjust: float = field(
        default=0.07, metadata={"help": "added to the mask probability, for blocks that overlap"}
    )
    mask_length: int = field(
        default=3, metadata={"help": "side in patches of the square blocks that stay visible; 1 = single patches"}
    )
    clone_batch: int = field(default=16, metadata={"help": "masks drawn of each image in an update"})
    ema_decay: float = field(default=0.9998, metadata={"help": "teacher's decay at the first update"})
    ema_end_decay: float = field(default=0.99999, metadata={"help": "teacher's decay at the last update of the ramp"})
    ema_anneal_end_step: int = field(default=100000, metadata={"help": "updates over which the decay ramps linearly"})
    average_top_k_layers: int = field(
        default=10, metadata={"help": "last main blocks whose average is the target; at most --d2v-depth"}
    )
    cls_loss: float = field(
        default=0.01, metadata={"help": "weight of predicting the mean target from the CLS token; 0 = none"}
    )
    recon_loss: float = field(
        default=0.0,
        metadata={
            "help": "weight of predicting each hidden patch's normed pixels as well, which starts faster than the "
            "teacher's features; needs --d2v-embed-dim = 3 x --d2v-patch-size squared; 0 = none"
        },
    )
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth rate of the last block; 0 = none"})
    decoder_dim: int = field(default=768, metadata={"help": "width of the convolutional decoder"})
    decoder_layers: int = field(default=6, metadata={"help": "layers of the decoder"})
    decoder_kernel: int = field(default=3, metadata={"help": "kernel of the decoder in patches"})
    decoder_groups: int = field(
        default=16, metadata={"help": "groups of the decoder's convolutions; divides both widths"}
    )


@dataclass
class _Base(FairseqDataclass):
    autocast: Optional[str] = field(default=None, metadata={"help": AUTOCAST_HELP})
    seed: int = II("common.seed")
    max_update: int = II("optimization.max_update")


Data2Vec2ImageConfig = flat_dataclass("Data2Vec2ImageConfig", {"d2v": Data2Vec2Config}, base=_Base)


@register_model("data2vec2_image", dataclass=Data2Vec2ImageConfig)
class Data2Vec2ImageModel(_Data2VecMultiModel):
    """fairseq's Data2Vec 2 on uint8 images.

    A subclass, not a wrapper, so that checkpoints hold fairseq's own parameter names and load wherever a released
    Data2Vec 2 does, `emkum.models.data2vec2_checkpoints.image_encoder_from_checkpoint` included.
    """

    def __init__(self, cfg: Any, autocast: str | None = None) -> None:
        chosen = Autocast(autocast)
        super().__init__(cfg, [cfg.supported_modality])
        self.autocast = chosen
        for name, values in (("pixel_mean", IMAGENET_MEAN), ("pixel_std", IMAGENET_STD)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    @classmethod
    def build_model(cls, cfg: Any, task: Any = None) -> "Data2Vec2ImageModel":
        part = collect_parts({"d2v": Data2Vec2Config}, cfg)["d2v"]
        return cls(fairseq_config(part, cfg.seed, cfg.max_update), cfg.autocast)

    def forward(self, image: Tensor, **options: Any) -> dict[str, Any]:
        """Losses of masked prediction, or features with `features_only=True`.

        Args:
            image: (B, 3, S, S) uint8.
            options: those of fairseq's model.
        """
        # The buffers have the parameters' type, which fairseq may have made a half one.
        image = image.to(self.pixel_mean.dtype, memory_format=torch.contiguous_format)
        normalized = (image - self.pixel_mean) / self.pixel_std
        with self.autocast.context(image.device):
            return super().forward(normalized, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load a checkpoint so that a resumed run equals one without a stop.

        fairseq moves the EMA teacher for an update at the start of the next one: a checkpoint's teacher lacks the last
        step. The model, whose number of updates fairseq sets before it loads, must not take that step for done.
        """
        loaded = super().load_state_dict(*arguments, **options)
        self.num_updates = max(0, self.num_updates - 1)
        return loaded

    @staticmethod
    def compute_var(y: Tensor) -> Tensor:
        """Mean over channels of the standard deviation over tokens, of all devices; fairseq's needs a GPU for that."""
        y = y.view(-1, y.size(-1))
        if not dist.is_initialized():
            return torch.sqrt(y.var(dim=0) + 1e-6).mean()
        count = torch.tensor(float(y.size(0)), device=y.device)
        total, squares = y.sum(dim=0), y.pow(2).sum(dim=0)
        for tensor in (count, total, squares):
            dist.all_reduce(tensor)
        variance = squares / (count - 1) - total.pow(2) / (count * (count - 1))
        return torch.sqrt(variance + 1e-6).mean()

    def max_positions(self) -> None:
        return None


def fairseq_config(part: Data2Vec2Config, seed: int, max_update: int) -> Any:
    """fairseq's nested configuration of an image model, with the settings of the released ones beside the options.

    Raises:
        UserError: options that do not go together.
    """
    _check(part)
    source = data2vec2_module("models.data2vec2")
    image_type = data2vec2_module("data.modality").Modality.IMAGE
    rates = np.linspace(0, part.drop_path, part.prenet_depth + part.depth).tolist()
    image = source.D2vImageConfig(
        input_size=part.input_size,
        patch_size=part.patch_size,
        embed_dim=part.embed_dim,
        prenet_depth=part.prenet_depth,
        end_drop_path_rate=rates[part.prenet_depth - 1] if part.prenet_depth else 0.0,
        num_extra_tokens=1,
        init_extra_token_zero=False,
        mask_prob=part.mask_prob,
        mask_prob_adjust=part.mask_prob_adjust,
        mask_length=part.mask_length,
        # Of blocks, those drawn stay visible.
        inverse_mask=part.mask_length > 1,
        ema_local_encoder=True,
        num_alibi_heads=part.num_heads,
        model_depth=part.depth,
        decoder=source.D2vDecoderConfig(
            decoder_dim=part.decoder_dim,
            decoder_layers=part.decoder_layers,
            decoder_kernel=part.decoder_kernel,
            decoder_groups=part.decoder_groups,
            input_dropout=0.0,
        ),
    )
    return source.Data2VecMultiConfig(
        seed=seed,
        max_update=max_update,
        supported_modality=image_type,
        modalities=source.D2vModalitiesConfig(image=image),
        embed_dim=part.embed_dim,
        depth=part.depth,
        num_heads=part.num_heads,
        start_drop_path_rate=rates[part.prenet_depth] if part.depth else 0.0,
        end_drop_path_rate=part.drop_path,
        encoder_dropout=0.0,
        post_mlp_drop=0.0,
        attention_dropout=0.0,
        clone_batch=part.clone_batch,
        average_top_k_layers=part.average_top_k_layers,
        instance_norm_target_layer=True,
        layer_norm_targets=True,
        cls_loss=part.cls_loss,
        recon_loss=part.recon_loss,
        ema_decay=part.ema_decay,
        ema_end_decay=part.ema_end_decay,
        ema_anneal_end_step=part.ema_anneal_end_step,
        ema_encoder_only=False,
        min_target_var=0.0,
        min_pred_var=0.0,
    )


def _check(part: Data2Vec2Config) -> None:
    for number, divisor in (
        ("embed_dim", "num_heads"),
        ("embed_dim", "decoder_groups"),
        ("decoder_dim", "decoder_groups"),
        ("input_size", "patch_size"),
    ):
        if getattr(part, number) % getattr(part, divisor):
            flags = [f"--d2v-{name.replace('_', '-')} {getattr(part, name)}" for name in (number, divisor)]
            raise UserError(f"{flags[0]} is no multiple of {flags[1]}")
    if not 1 <= part.average_top_k_layers <= part.depth:
        raise UserError(f"--d2v-average-top-k-layers {part.average_top_k_layers}: want 1 to --d2v-depth {part.depth}")
    pixels = 3 * part.patch_size**2
    if part.recon_loss > 0 and part.embed_dim != pixels:
        raise UserError(
            f"--d2v-recon-loss needs --d2v-embed-dim {pixels}, the values in a patch, not {part.embed_dim}: "
            "fairseq's projection to pixels keeps the width"
        )

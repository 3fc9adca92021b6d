"""What a teacher is."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emkum.errors import UserError
from emkum.layers.precision import Autocast
from emkum.outputs import TeacherOutput

IMAGE, TEXT = "image", "text"
# Names the teacher that is no model of its own, but the student's moving average.
SELF = "self"
# What images and captions are to predict of a teacher that reads both.
TARGETS = ("image", "own", "average", "fused")


@dataclass
class TeacherConfig:
    weights: str = field(
        default="hub",
        metadata={"help": "weights of a timm: or openclip: teacher: a local file, or 'hub' to download them"},
    )
    image_size: int = field(
        default=0, metadata={"help": "side of the teacher's crops in pixels; 0 = what the teacher was trained with"}
    )
    pooling: str = field(
        default="default",
        metadata={
            "help": "the global feature: default (as the model defines it; for data2vec2 mean_max), cls, mean or "
            "mean_max of the last layer's patches, layers (data2vec2: CLS of the mean of instance-normed layers)"
        },
    )
    target: str = field(
        default="image",
        metadata={
            "help": "of a teacher that reads both, what student predicts: image (of the image, from either), own (each "
            "its own modality's), average (the mean of both), fused (of the pair read together)"
        },
    )
    allow_missing: str = field(
        default="",
        metadata={
            "help": "parameters that the weights may lack or have beside the teacher's, separated by commas; "
            "* stands for anything; empty = none"
        },
    )
    autocast: str = field(
        default="",
        metadata={"help": "run the teacher under torch.autocast: auto, bfloat16, float16; empty = off"},
    )
    compile: bool = field(default=False, metadata={"help": "run the teacher through torch.compile"})


def shared_options(config: TeacherConfig) -> dict[str, Any]:
    """What of a teacher's options is the same for all kinds, as arguments of FrozenTeacher."""
    return {"target": config.target, "autocast": config.autocast, "compiled": config.compile}


@dataclass
class TeacherInput:
    """What a teacher may know of a batch of B images and their T captions.

    Attributes:
        images: (B, 3, S, S) uint8 crops; None for texts alone.
        ids: (B,) int64, index of each sample in its split.
        views: (B,) int64, which of the repeating crops each one is; -1 where crops do not repeat.
        split: name of the split.
        text: (T, L) int64 by the teacher's own tokenizer, None where it reads none.
        text_padding_mask: (T, L), True at padding; None where nothing is padded.
        caption_image: (T,) int64, for each caption the row of its image.
    """

    images: Tensor | None
    ids: Tensor
    views: Tensor
    split: str
    text: Tensor | None = None
    text_padding_mask: Tensor | None = None
    caption_image: Tensor | None = None


class Teacher(Protocol):
    """Targets for a batch; never trained, never saved with the student.

    Attributes:
        width: channels D_t of the global feature.
        image_size: side in pixels of the crops it wants; 0 = it does not look at them.
        num_classes: C of the logits; 0 = it has none.
        grid: rows and columns of its patches; None where it has none.
        patch_width: channels D_p of its patches; 0 where it has none.
        modalities: what it reads: "image", "text" or both.
        tokenizer: file or folder of the tokenizer that it reads text by; None where it reads none.
        max_tokens: longest text in tokens; 0 = it reads none.
        identity: what the targets depend on (architecture, hash of the weights, transform, pooling), as plain data.
    """

    width: int
    image_size: int
    num_classes: int
    grid: tuple[int, int] | None
    patch_width: int
    modalities: tuple[str, ...]
    tokenizer: Path | None
    max_tokens: int
    identity: dict[str, Any]

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        """Targets for a batch, without gradient."""
        ...

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        """Called before the first batch of a split, with its content hash and what its random crops depend on.

        Raises:
            UserError: the teacher has no targets for these.
        """
        ...


def reads_captions(teacher: Teacher) -> bool:
    """Whether a teacher of images wants the captions too."""
    return getattr(teacher, "target", "image") != "image"


class FrozenTeacher:
    """A frozen model that looks at the pixels, or reads texts, or both.

    What it declares of its outputs is measured: it runs once, on a black image and a text of two tokens.

    Args:
        model: `model(images, text, padding_mask)` gives TeacherOutput; with `layers=True` also all layers. Images are
            (B, 3, S, S), normalized, text (T, L) ids; either is None where `modalities` lacks it. Eval mode and no
            gradients are set here; it moves to the inputs' device on first use.
        identity: plain data that identifies the weights; the transform and the target are added.
        image_size: side of the input in pixels; 0 = it reads text alone.
        mean, std: normalization of pixels in [0, 1].
        modalities: what it reads.
        target: one of TARGETS; another one than "image" needs both modalities. "fused" needs the method
            `model.fuse(images, text, padding_mask)`, (T, D_t) of as many images as texts.
        tokenizer, max_tokens: see Teacher.
        autocast: see TeacherConfig.
        compiled: run through torch.compile.
        layers: give all layers.

    Raises:
        UserError: the target needs what the teacher does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        identity: dict[str, Any],
        image_size: int = 0,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        modalities: tuple[str, ...] = (IMAGE,),
        target: str = "image",
        tokenizer: Path | None = None,
        max_tokens: int = 0,
        autocast: str = "",
        compiled: bool = False,
        layers: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.modalities = modalities
        self.target = target
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.layers = layers
        self.autocast = Autocast(autocast)
        self.identity = identity | {"image_size": image_size, "mean": list(mean), "std": list(std), "target": target}
        self._assert_target()
        self._measure()
        # Not before: the measurement would be compiled as well.
        self._run = torch.compile(self.model) if compiled else self.model

    def _assert_target(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"--teacher-target {self.target!r} is unknown; choose from {', '.join(TARGETS)}")
        name = self.identity.get("teacher", "the teacher")
        if self.target != "image" and len(self.modalities) < 2:
            raise UserError(
                f"--teacher-target {self.target} needs a teacher that reads images and text; {name} does not"
            )
        if self.target == "fused" and not hasattr(self.model, "fuse"):
            raise UserError(f"--teacher-target fused: {name} cannot read an image and a text together")

    def _measure(self) -> None:
        images = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        text = torch.zeros(1, 2, dtype=torch.int64)
        self._run = self.model
        output = self._forward(
            images if IMAGE in self.modalities else None, text if TEXT in self.modalities else None, None, None
        )
        self.width: int = output.features.shape[1]
        self.num_classes: int = 0 if output.logits is None else output.logits.shape[1]
        self.patch_width: int = 0 if output.patches is None else output.patches.shape[2]
        self.grid: tuple[int, int] | None = None
        if IMAGE in self.modalities and output.patches is not None:
            side = round(output.patches.shape[1] ** 0.5)
            self.grid = (side, side)

    @torch.inference_mode()
    def _forward(
        self, images: Tensor | None, text: Tensor | None, padding_mask: Tensor | None, caption_image: Tensor | None
    ) -> TeacherOutput:
        device = (text if images is None else images).device
        if self.mean.device != device:
            self.model, self.mean, self.std = (part.to(device) for part in (self.model, self.mean, self.std))
        if images is not None:
            # Crops come with their channels last in memory.
            images = images.to(torch.float32, memory_format=torch.contiguous_format)
            images = (images / 255 - self.mean) / self.std
        reads_text = self.target != "image" or IMAGE not in self.modalities
        with self.autocast.context(device):
            output = self._run(images, text if reads_text else None, padding_mask, layers=self.layers)
            if self.target == "fused":
                rows = torch.arange(len(text), device=device) if caption_image is None else caption_image
                fused = self.model.fuse(images[rows], text, padding_mask)
                output = replace(output, text_features=fused)
        output = TeacherOutput(*(_float(getattr(output, part.name)) for part in fields(output)))
        return _combine(output, self.target, caption_image)

    def __call__(self, batch: TeacherInput) -> TeacherOutput:
        output = self._forward(batch.images, batch.text, batch.text_padding_mask, batch.caption_image)
        # Inference tensors cannot be saved for backward; a clone outside the mode is an ordinary one.
        return TeacherOutput(*(_clone(getattr(output, part.name)) for part in fields(output)))

    def open_split(self, split: str, data_hash: str, crops: dict[str, Any]) -> None:
        pass


def _float(part: Tensor | tuple[Tensor, ...] | None) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_float, part))
    return None if part is None else part.float()


def _clone(part: Tensor | tuple[Tensor, ...] | None) -> Any:
    if isinstance(part, tuple):
        return tuple(map(_clone, part))
    return None if part is None else part.clone()


def _combine(output: TeacherOutput, target: str, caption_image: Tensor | None) -> TeacherOutput:
    """What images and captions are to predict, out of what the teacher makes of each."""
    if target in ("image", "own"):
        return output
    images, texts = output.features, output.text_features
    if caption_image is None:
        caption_image = torch.arange(len(texts), device=texts.device)
    # Mean over the captions of each image.
    counts = torch.bincount(caption_image, minlength=len(images)).clamp(min=1)
    of_captions = torch.zeros_like(images).index_add_(0, caption_image, texts) / counts[:, None]
    if target == "fused":
        return replace(output, features=of_captions)
    return replace(output, features=(images + of_captions) / 2, text_features=(images[caption_image] + texts) / 2)

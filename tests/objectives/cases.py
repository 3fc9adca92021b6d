"""Inputs of objectives: every field of what may reach one, random and small, with images that occur twice."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emkum.objectives import Objective, Setting
from emkum.outputs import Batch, ModalityOutput, StudentOutput, TeacherOutput

CAPTIONS, LENGTH, PATCHES, VOCABULARY = 2, 6, 4, 20
SETTING = Setting(
    width=6,
    contrast_width=5,
    vocab_size=VOCABULARY,
    num_images=32,
    max_updates=100,
    target_width=6,
    num_classes=9,
    patch_width=8,
)
HIDDEN = 11
# Options that bring everything of an objective into play.
OPTIONS: dict[str, object] = {
    "kd_contrastive_bank_size": 12,
    "kd_reduced_dim": 3,
    "kd_reduced_loss": "contrastive",
    "bank_itc_size": 12,
    "bank_itc_half_life": 3.0,
    "momentum_itc_size": 12,
    "proximal_itc_negatives": 10,
    "cmli_chunk": 1,
    "target_cmli_empty_target": True,
    "itm_negatives": "hard",
    "itm_hard_scale": 3.0,
    "mim_loss": "in_batch",
    "mim_chunk": 6,
    "dino_crops": True,
    "dino_prototypes": 13,
    "dino_hidden": 8,
    "dino_bottleneck": 4,
    "dino_frozen_updates": 1,
}


def _modality(rows: int, tokens: int, padding_mask: Tensor | None, generator: torch.Generator) -> ModalityOutput:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return ModalityOutput(
        tokens=draw(rows, tokens, SETTING.width),
        padding_mask=padding_mask,
        hidden=draw(rows, HIDDEN),
        features=draw(rows, SETTING.contrast_width),
        prediction=draw(rows, SETTING.target_width),
        logits=draw(rows, SETTING.num_classes),
    )


def make_case(images: int = 8, seed: int = 0) -> tuple[StudentOutput, TeacherOutput, Batch]:
    """A float64 batch: `images` images, CAPTIONS captions each in order, padded; the last image is the first again.

    Rows of a part of the batch are `part_of(case, rows)`.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(images)
    ids[-1] = ids[0]
    owners = torch.arange(images).repeat_interleave(CAPTIONS)
    captions = len(owners)
    lengths = torch.randint(3, LENGTH + 1, (captions,), generator=generator)
    # One caption of full length in each image's share, so that parts of a batch are as long as the whole.
    lengths[::CAPTIONS] = LENGTH
    places = torch.arange(LENGTH)
    padding = places >= lengths[:, None]
    special = padding | (places == 0) | (places == lengths[:, None] - 1)
    chosen = torch.rand(captions, LENGTH, generator=generator) < 0.4
    chosen[:, 1] = True
    true_ids = torch.randint(4, VOCABULARY, (captions, LENGTH), generator=generator)
    patch_mask = torch.rand(images, PATCHES, generator=generator) < 0.5
    patch_mask[:, 0] = True

    def image() -> ModalityOutput:
        return _modality(images, 1 + PATCHES, None, generator)

    def text() -> ModalityOutput:
        return _modality(captions, LENGTH, padding, generator)

    student = StudentOutput(
        image=image(),
        text=text(),
        masked_image=image(),
        masked_text=text(),
        average=StudentOutput(image(), text()),
        crops=_modality(2 * images, 1 + PATCHES, None, generator),
    )
    teacher = TeacherOutput(
        features=torch.randn(images, SETTING.target_width, generator=generator, dtype=torch.float64),
        patches=torch.randn(images, PATCHES, SETTING.patch_width, generator=generator, dtype=torch.float64),
        logits=torch.randn(images, SETTING.num_classes, generator=generator, dtype=torch.float64),
    )
    batch = Batch(
        image_ids=ids,
        caption_image=owners,
        special=special,
        text_targets=torch.where(chosen & ~special, true_ids, -100),
        patch_mask=patch_mask,
        sample_ids=torch.arange(images),
    )
    return student, teacher, batch


def part_of(
    case: tuple[StudentOutput, TeacherOutput, Batch], rows: slice
) -> tuple[StudentOutput, TeacherOutput, Batch]:
    """The same for some images and their captions."""
    student, teacher, batch = case
    images = len(batch.image_ids)
    pieces = {images: rows, CAPTIONS * images: slice(rows.start * CAPTIONS, rows.stop * CAPTIONS)}

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[pieces[len(value)]]
        if is_dataclass(value):
            return replace(value, **{f.name: cut(getattr(value, f.name)) for f in fields(value)})
        return value

    crops = student.crops
    student = cut(replace(student, crops=None))
    views = {
        f.name: torch.cat([part[rows] for part in getattr(crops, f.name).chunk(2)])
        for f in fields(crops)
        if isinstance(getattr(crops, f.name), Tensor)
    }
    student = replace(student, crops=replace(crops, **views))
    batch = cut(batch)
    return student, cut(teacher), replace(batch, caption_image=batch.caption_image - rows.start)


def tensors_of(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """All floating-point tensors of nested outputs by their dotted names."""
    if isinstance(value, Tensor):
        return {prefix: value} if value.is_floating_point() else {}
    if not is_dataclass(value):
        return {}
    found: dict[str, Tensor] = {}
    for field in fields(value):
        found |= tensors_of(getattr(value, field.name), f"{prefix}.{field.name}".lstrip("."))
    return found


def converted(value: Any, change: Any) -> Any:
    """Nested outputs with `change` applied to each floating-point tensor."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if not is_dataclass(value):
        return value
    return replace(value, **{f.name: converted(getattr(value, f.name), change) for f in fields(value)})


def with_gradients(student: StudentOutput) -> tuple[StudentOutput, dict[str, Tensor]]:
    """A copy whose tensors are leaves that take gradients, and these leaves by name; the average's take none."""
    copy = converted(student, lambda tensor: tensor.detach().clone().requires_grad_())
    if copy.average is not None:
        copy = replace(copy, average=converted(copy.average, Tensor.detach))
    return copy, {name: leaf for name, leaf in tensors_of(copy).items() if leaf.requires_grad}


def after_updates(objective: Objective, cases: list[tuple[StudentOutput, TeacherOutput, Batch]]) -> dict[str, Tensor]:
    """An update for each case, of the objective's state alone: last loss, its gradients and buffers after, by name."""
    for number, (student, teacher, batch) in enumerate(cases):
        objective.begin_update(number, 0.9)
        student, leaves = with_gradients(student)
        objective.zero_grad()
        loss = objective(student, teacher, batch).loss
        loss.backward()
    objective.begin_update(len(cases), 0.9)
    found = {"loss": loss.detach()}
    found |= {f"parameter {key}": p.grad for key, p in objective.named_parameters() if p.grad is not None}
    found |= {f"input {key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return found | {f"buffer {key}": value for key, value in objective.named_buffers()}

"""Distillation of tokens against loops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emkum.errors import UserError
from emkum.layers.layer_targets import mean_of_layers
from emkum.objectives.patch_distillation import (
    PatchDistillation,
    PatchDistillationConfig,
    distillation_targets,
    patch_distillation,
)
from emkum.outputs import StudentOutput
from tests.objectives.cases import SETTING, make_case
from tests.objectives.naive import assert_equals, cosine, layer_norm, mean


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def naive_tokens(layers: list[Tensor], lengths: list[int], norm_channels: bool) -> list[Tensor]:
    """All tokens that are no padding, sample by sample: mean over layers of each layer normed over its tokens."""
    found = []
    for row, length in enumerate(lengths):
        normed = []
        for layer in layers:
            tokens = layer[row, :length]
            center = sum(tokens) / length
            variance = sum((token - center) ** 2 for token in tokens) / length
            normed.append([(token - center) / (variance + 1e-8).sqrt() for token in tokens])
        for place in range(length):
            token = sum(tokens[place] for tokens in normed) / len(layers)
            found.append(layer_norm(token) if norm_channels else token)
    return found


@pytest.mark.parametrize("norm_channels", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 3, 4]], ids=["whole", "padded"])
def test_unimodal_distillation_against_loops(lengths: list[int], norm_channels: bool) -> None:
    student = [torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(3, 5, 6, dtype=torch.float64) for _ in range(3)]
    padding = torch.arange(5) >= torch.tensor(lengths)[:, None] if min(lengths) < 5 else None
    loss = patch_distillation(student, mean_of_layers(teacher, padding, norm_channels), padding, norm_channels)
    pairs = zip(
        naive_tokens(student, lengths, norm_channels), naive_tokens(teacher, lengths, norm_channels), strict=True
    )
    expected = mean([((ours - theirs) ** 2).sum() / 6 for ours, theirs in pairs])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    found, wanted = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_padding_does_not_matter() -> None:
    student, teacher = torch.randn(2, 2, 5, 6)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    losses = []
    for filling in (0.0, 1e3):
        layers = [tokens.masked_fill(padding[..., None], filling) for tokens in (student, teacher)]
        losses.append(patch_distillation(layers[:1], mean_of_layers(layers[1:], padding), padding))
    assert losses[0] == losses[1]
    # Equal tokens are at no distance, and longer padding changes nothing.
    longer = torch.cat([student, torch.randn(2, 3, 6)], 1)
    more = torch.cat([padding, torch.ones(2, 3, dtype=torch.bool)], 1)
    targets = mean_of_layers([teacher], padding), mean_of_layers([torch.cat([teacher, torch.randn(2, 3, 6)], 1)], more)
    short, long = (
        patch_distillation([tokens], target, mask)
        for tokens, target, mask in zip((student, longer), targets, (padding, more), strict=True)
    )
    torch.testing.assert_close(short, long)
    assert patch_distillation([teacher], targets[0], padding).item() == 0


def test_of_a_teachers_tokens_those_of_the_student_count() -> None:
    """Special tokens that the student does not have are left out before anything is normed."""
    layers = [torch.randn(2, 8, 6, dtype=torch.float64) for _ in range(3)]
    kept = [torch.cat([layer[:, :1], layer[:, 3:]], dim=1) for layer in layers]
    assert torch.equal(distillation_targets(layers, 6), mean_of_layers(kept))
    assert torch.equal(distillation_targets(layers, 8), mean_of_layers(layers))
    padding = torch.arange(8) >= torch.tensor([[8], [5]])
    assert torch.equal(distillation_targets(layers, 8, padding, False), mean_of_layers(layers, padding, False))
    with pytest.raises(UserError, match="the teacher has 8 tokens, the student 9; give one with a CLS token"):
        distillation_targets(layers, 9)
    with pytest.raises(UserError, match="layers have several shapes .4 x 12, 8 x 6.; give a Transformer"):
        distillation_targets([*layers, torch.randn(2, 4, 12)], 8)


@pytest.mark.parametrize("whiten", [False, True])
def test_patches_against_loops(whiten: bool) -> None:
    case = make_case(4)
    objective = PatchDistillation(PatchDistillationConfig(whiten), SETTING)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_()

    def predictions(student: StudentOutput) -> list[Tensor]:
        norm, linear = objective.head
        tokens = [token for sample in student.image.tokens for token in sample[1:]]
        return [linear.weight @ (layer_norm(t, 1e-6) * norm.weight + norm.bias) + linear.bias for t in tokens]

    patches = [layer_norm(patch) if whiten else patch for sample in case[1].patches for patch in sample]

    def reference(student: StudentOutput) -> Tensor:
        pairs = zip(predictions(student), patches, strict=True)
        return mean([((p - t) ** 2).sum() / SETTING.patch_width for p, t in pairs])

    out = assert_equals(objective, case, reference)
    assert out.metrics.keys() == {"image_loss", "image_agreement"}
    similarity = mean([cosine(p, t) for p, t in zip(predictions(case[0]), patches, strict=True)])
    assert out.metrics["image_agreement"].item() == pytest.approx(100 * similarity.item())


def test_captions_have_no_part_in_patches() -> None:
    student, teacher, batch = make_case(4)
    objective = PatchDistillation(PatchDistillationConfig(), SETTING).double()
    other = replace(student, text=replace(student.text, tokens=student.text.tokens + 1))
    assert objective(student, teacher, batch).loss == objective(other, teacher, batch).loss
    needs = PatchDistillation.requires
    assert needs.patches and needs.tokens and needs.patch_grid and not needs.prediction

"""The image quantizer: its losses against loops, its training, and that all its codes come into use."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emkum.errors import UserError
from emkum.models.codebook import START_ROWS_PER_CODE
from emkum.models.quantizer import ImageQuantizer, QuantizerConfig, draw_mask
from emkum.objectives.target_codes import CodeDistillation, CodeDistillationConfig
from emkum.outputs import TeacherOutput
from tests.objectives.cases import SETTING

WIDTH, PATCHES = 8, 5
TINY = QuantizerConfig(codes=4, code_width=3, mask=0.8)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def teacher_output(rows: int, width: int = WIDTH, patch_width: int = WIDTH) -> TeacherOutput:
    return TeacherOutput(torch.randn(rows, width), patches=torch.randn(rows, PATCHES, patch_width))


def ready(model: ImageQuantizer) -> ImageQuantizer:
    """With codes."""
    model(teacher_output(START_ROWS_PER_CODE * len(model.codebook), model.project.in_features))
    model.begin_update(1)
    assert model.codebook.is_started()
    return model


def attention_block(block: torch.nn.Module, tokens: Tensor) -> Tensor:
    """timm's block of one head, written out for one sample (N, D)."""
    normed = block.norm1(tokens)
    query, key, value = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
    weights = (query @ key.T / query.shape[1] ** 0.5).softmax(1)
    tokens = tokens + (weights @ value) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = F.gelu(block.norm2(tokens) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return tokens + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_losses_against_loops() -> None:
    model = ready(ImageQuantizer(TINY, WIDTH, WIDTH)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    teacher = TeacherOutput(
        *(part.double() for part in (torch.randn(6, WIDTH),)), patches=torch.randn(6, 5, 8).double()
    )
    out = model(teacher)
    mask = draw_mask(6, PATCHES, TINY.mask, torch.device("cpu"), training=False)
    cosines, distances, codes = [], [], []
    for feature, patches, hidden in zip(teacher.features, teacher.patches, mask, strict=True):
        z = model.project.weight @ feature + model.project.bias
        z = z / z.norm()
        similarities = [float(z.detach() @ code) for code in model.codebook.codes]
        codes.append(similarities.index(max(similarities)))
        code = model.codebook.codes[codes[-1]]
        distances.append(sum((a - b) ** 2 for a, b in zip(z, code, strict=True)))
        # In value the code, in gradient the vector.
        first = model.unproject.weight @ (code + z - z.detach()) + model.unproject.bias
        tokens = [first] + [model.mask_token if h else p for p, h in zip(patches, hidden, strict=True)]
        rebuilt = model.head(attention_block(model.decoder, torch.stack(tokens))[0])
        cosines.append(rebuilt @ feature / rebuilt.norm() / feature.norm())
    assert len(set(codes)) > 1
    rebuild, commitment = 1 - sum(cosines) / 6, sum(distances) / 6
    torch.testing.assert_close(out.rebuild_loss, rebuild, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.commitment_loss, commitment, rtol=1e-6, atol=1e-9)
    assert out.figures["rebuilt"].item() == pytest.approx(100 * (1 - rebuild.item()))
    assert model.codes_of(teacher.features).tolist() == codes
    parameters = list(model.parameters())
    found = torch.autograd.grad(out.rebuild_loss + out.commitment_loss, parameters)
    wanted = torch.autograd.grad(rebuild + commitment, parameters)
    for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        assert other.abs().sum() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    low = model.float()(TeacherOutput(teacher.features.float(), patches=teacher.patches.float()))
    torch.testing.assert_close(low.rebuild_loss.double(), rebuild, rtol=1e-4, atol=1e-5)


def test_mask_hides_its_part_of_each_row() -> None:
    cpu = torch.device("cpu")
    for training in (False, True):
        mask = draw_mask(50, 10, 0.9, cpu, training)
        assert (mask.sum(1) == 9).all()
        assert (mask.sum(0) > 30).all(), "any patch may be the visible one"
    assert torch.equal(draw_mask(5, 10, 0.5, cpu, False), draw_mask(5, 10, 0.5, cpu, False))
    assert not torch.equal(draw_mask(5, 10, 0.5, cpu, True), draw_mask(5, 10, 0.5, cpu, True))
    assert draw_mask(2, 4, 0.0, cpu, True).sum() == 0 and draw_mask(2, 4, 1.0, cpu, True).all()


def test_before_there_are_codes_the_vector_passes() -> None:
    model = ImageQuantizer(TINY, WIDTH, WIDTH).train()
    out = model(teacher_output(3))
    assert out.commitment_loss.item() == 0 and out.rebuild_loss.item() > 0
    out.rebuild_loss.backward()
    assert model.project.weight.grad.abs().sum() > 0


def test_patches_of_another_width_and_odd_widths() -> None:
    model = ImageQuantizer(TINY, 12, 6)
    assert model(teacher_output(3, 12, 6)).rebuild_loss.isfinite()
    assert ImageQuantizer(TINY, 130, 130).decoder.attn.num_heads == 2
    assert ImageQuantizer(TINY, 201, 201).decoder.attn.num_heads == 3


def test_half_precision_parameters() -> None:
    model = ready(ImageQuantizer(TINY, WIDTH, WIDTH)).bfloat16()
    out = model(teacher_output(4))
    assert out.rebuild_loss.dtype == out.commitment_loss.dtype == torch.float32
    (out.rebuild_loss + out.commitment_loss).backward()
    assert model.codebook.codes.dtype == torch.float32 and model.project.weight.grad.isfinite().all()


def clusters_of_images(rows: int, seed: int) -> TeacherOutput:
    """Features around 12 centers, patches that tell nothing of them."""
    centers = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(12, (rows,), generator=generator)
    features = centers[chosen] + 0.3 * torch.randn(rows, WIDTH, generator=generator)
    return TeacherOutput(features, patches=torch.randn(rows, PATCHES, WIDTH, generator=generator))


def test_training_uses_all_codes_and_lowers_the_loss() -> None:
    config = QuantizerConfig(codes=16, code_width=4, decay=0.9, window=20)
    model = ImageQuantizer(config, WIDTH, WIDTH).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for update in range(250):
        model.begin_update(update)
        out = model(clusters_of_images(32, update))
        loss = out.rebuild_loss + out.commitment_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(out.rebuild_loss.item())
    first, last = (sum(part) / 20 for part in (losses[:20], losses[-20:]))
    assert last < 0.5 * first, (first, last)
    assert out.figures["codes_used"].item() == 100
    assert out.figures["perplexity"].item() > 10
    # Images of one center mostly share their codes.
    model.eval()
    held_out = clusters_of_images(400, 1000)
    assert len(model.codes_of(held_out.features).unique()) == 16
    assert model(held_out).figures["rebuilt"].item() > 80


def test_the_objective_finds_the_same_codes(tmp_path: Path) -> None:
    model = ready(ImageQuantizer(TINY, WIDTH, WIDTH))
    state = {f"quantizer.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "quantizer.pt"
    torch.save({"cfg": {"model": {"_name": "image_quantizer"}}, "model": state, "task_state": {}}, path)
    setting = replace(SETTING, target_width=WIDTH)
    objective = CodeDistillation(CodeDistillationConfig(codes=TINY.codes, quantizer=str(path)), setting)
    features = torch.randn(50, WIDTH)
    assert objective.table(features).tolist() == model.codes_of(features).tolist()
    assert len(model.codes_of(features).unique()) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": 1}, "--quantizer-codes 1: want 2 or more"),
        ({"code_width": 0}, "--quantizer-code-width 0: want 1 or more"),
        ({"window": 0}, "--quantizer-window 0: want 1 or more"),
        ({"decay": 1.0}, "--quantizer-decay 1: want 0 to below 1"),
        ({"mask": 1.5}, "--quantizer-mask 1.5: want 0"),
        ({"revive_below": -1.0}, "--quantizer-revive-below -1: want 0"),
    ],
)
def test_options_out_of_range(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageQuantizer(replace(TINY, **change), WIDTH, WIDTH)

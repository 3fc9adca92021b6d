"""What holds for every objective, and how they are named and checked."""

from pathlib import Path

import pytest
import torch

from emkum.errors import UserError
from emkum.layers.temperature import LogitScale
from emkum.objectives import (
    OBJECTIVES,
    Requirements,
    assert_teacher_gives,
    build_objectives,
    objective_configs,
    parse_objectives,
    required,
)
from tests.objectives.cases import OPTIONS, SETTING, converted, make_case
from tests.objectives.target_files import write_target_files


def test_scale_stays_in_its_range_and_can_come_back() -> None:
    scale = LogitScale(1000.0)
    assert scale().item() == pytest.approx(100.0, rel=1e-5)
    scale().backward()
    assert scale.log_scale.grad.item() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_computed_in_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    student, teacher, batch = make_case()
    options = OPTIONS | write_target_files(tmp_path)
    # What is too coarse for half precision is coarse before the comparison.
    student, teacher = (converted(part, lambda t: t.to(dtype).float()) for part in (student, teacher))
    half = converted(student, lambda t: t.to(dtype))
    losses = []
    for inputs in (student, half):
        torch.manual_seed(0)
        objective = build_objectives([name], options, SETTING)[name].eval()
        losses.append(objective(inputs, teacher, batch).loss)
    full, low = losses
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=1e-2, atol=1e-2)


def test_names_are_checked() -> None:
    assert parse_objectives("itc, kd_mse") == ["itc", "kd_mse"]
    for wrong in ("itc,nonsense", "", "itc,itc"):
        with pytest.raises(UserError, match="kd_contrastive"):
            parse_objectives(wrong)


def test_teachers_are_checked() -> None:
    itc, both, kd = (objective_configs(names, {}) for names in (["itc"], ["itc", "kd_mse"], ["kd_mse"]))
    assert required(both).teacher and not required(itc).teacher
    assert_teacher_gives(itc, None, "")
    assert_teacher_gives(both, Requirements(features=True), "timm:x")
    with pytest.raises(UserError, match="objective kd_mse needs a --teacher with a global feature"):
        assert_teacher_gives(both, None, "")
    with pytest.raises(UserError, match="objective kd_mse needs a teacher with a global feature; bert:x gives none"):
        assert_teacher_gives(kd, Requirements(), "bert:x")
    # What an objective needs may depend on its options.
    layers = objective_configs(["itc"], {"itc_layers": "hidden,logits"})
    with pytest.raises(UserError, match="objective itc needs a teacher with logits; timm:x gives none"):
        assert_teacher_gives(layers, Requirements(features=True), "timm:x")

"""Which parameters learn slower or are not decayed, and the optimizer that reads it."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from emkum.models.builders import build_student
from emkum.models.parameter_groups import LearningRateConfig, assign_overrides
from emkum.models.timm_encoder import TimmImageEncoder
from emkum.objectives import build_objectives
from user_dir.optimizers import GroupedAdamW, GroupedAdamWConfig

RATES = LearningRateConfig(image_encoder=0.2, text_encoder=0.5)


class Trained(nn.Module):
    """A student and an objective, as the fairseq model holds them."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        options = {"student_size": "tiny", "image_size": 32, "image_patch_size": 8, "image_layers": 1, **options}
        self.student = build_student({"text_layers": 1, **options}, vocab_size=20, target_width=5)
        self.objectives = build_objectives(["itc"], {}, None)
        assign_overrides(self, self.student, RATES)


def scales(model: nn.Module, key: str) -> dict[str, float]:
    return {name: parameter.optim_overrides["optimizer"][key] for name, parameter in model.named_parameters()}


def names(prefix: str, scaled: Iterable[str]) -> set[str]:
    return {name.removeprefix(prefix) for name in scaled if name.startswith(prefix)}


def test_weights_of_layers_alone_are_decayed() -> None:
    model = Trained()
    decayed = {name for name, scale in scales(model, "weight_decay_scale").items() if scale == 1.0}
    assert set(scales(model, "weight_decay_scale").values()) == {0.0, 1.0}
    block = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    image, text = "student.image_encoder.", "student.text_encoder."
    assert names(image, decayed) == {
        "modality_encoders.IMAGE.local_encoder.proj.weight",
        *(f"blocks.0.{name}" for name in block),
    }
    assert names(text, decayed) == {f"blocks.0.{name}" for name in block}
    assert names("student.shared_encoder.", decayed) == {f"blocks.0.{name}" for name in block}
    assert {name for name in decayed if not name.startswith((image, text, "student.shared_encoder."))} == {
        "student.distillation_head.1.weight"
    }


def test_tables_and_tokens_are_not_decayed() -> None:
    scaled = scales(Trained(), "weight_decay_scale")
    for name in (
        "student.image_encoder.modality_encoders.IMAGE.extra_tokens",
        "student.text_encoder.modality_encoders.TEXT.local_encoder.embed_tokens.weight",
        "student.text_encoder.modality_encoders.TEXT.local_encoder.embed_positions.weight",
        "student.token_types.embedding.weight",
        "student.token_types.scale",
        "objectives.itc.scale.log_scale",
    ):
        assert scaled[name] == 0.0, name


def test_timm_names_are_told_apart() -> None:
    scaled = scales(Trained(image_encoder="timm:test_vit"), "weight_decay_scale")
    model = "student.image_encoder.model."
    assert scaled[f"{model}patch_embed.proj.weight"] == 1.0
    assert scaled[f"{model}blocks.0.attn.qkv.weight"] == 1.0
    assert scaled["student.text_projection.weight"] == 1.0
    for name in ("pos_embed", "cls_token", "patch_embed.proj.bias", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"):
        assert scaled[model + name] == 0.0, name


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_further_tokens_and_tables_are_not_decayed(name: str) -> None:
    with torch.device("meta"):
        encoder = TimmImageEncoder(name, "", 32, 1)
    model = Trained()
    model.student.image_encoder = encoder
    assign_overrides(model, model.student, RATES)
    decayed = {name for name, scale in scales(model, "weight_decay_scale").items() if scale == 1.0}
    kept = {name.removeprefix("model.") for name in names("student.image_encoder.", decayed)}
    assert kept == {
        "patch_embed.proj.weight",
        *(f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }


def test_encoders_learn_at_their_own_rate() -> None:
    for name, scale in scales(Trained(image_encoder="timm:test_vit"), "lr_scale").items():
        kind = name.removeprefix("student.").split(".")[0]
        assert scale == {"image_encoder": 0.2, "text_encoder": 0.5}.get(kind, 1.0), name


def small_model(seed: int = 0) -> nn.Sequential:
    """Parameters of four groups: two factors of the learning rate, with and without decay."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for layer, rate in ((model[0], 0.25), (model[2], 1.0)):
        for name, decay in (("weight", 1.0), ("bias", 0.0)):
            getattr(layer, name).optim_overrides = {"optimizer": {"lr_scale": rate, "weight_decay_scale": decay}}
    return model


def config(lr: float = 0.05, decay: float = 0.3) -> GroupedAdamWConfig:
    return GroupedAdamWConfig(adamw_beta1=0.8, adamw_beta2=0.9, adamw_eps=1e-5, adamw_weight_decay=decay, lr=[lr])


def reference(model: nn.Sequential, lr: float = 0.05, decay: float = 0.3) -> torch.optim.AdamW:
    groups = [
        {"params": [getattr(layer, name)], "lr": lr * rate, "weight_decay": decay if name == "weight" else 0.0}
        for layer, rate in ((model[0], 0.25), (model[2], 1.0))
        for name in ("weight", "bias")
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-5)


def step(model: nn.Module, optimizer: GroupedAdamW | torch.optim.Optimizer, number: int) -> None:
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
    model.zero_grad()
    (model(batch) ** 2).sum().backward()
    optimizer.step()


def assert_equal_parameters(actual: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_grouped_adamw_is_adamw_with_groups() -> None:
    ours, theirs = small_model(), small_model()
    optimizer, expected = GroupedAdamW(config(), ours.parameters()), reference(theirs)
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    for number in range(3):
        step(ours, optimizer, number)
        step(theirs, expected, number)
    assert_equal_parameters(ours, theirs)
    assert all((now - before).abs().max() > 1e-3 for now, before in zip(ours.parameters(), start, strict=True))


def test_state_dict_round_trip_goes_on_as_if_never_stopped() -> None:
    theirs = small_model()
    expected = reference(theirs)
    ours = small_model()
    optimizer = GroupedAdamW(config(), ours.parameters())
    for number in range(2):
        step(ours, optimizer, number)
        step(theirs, expected, number)
    resumed = small_model(seed=5)
    resumed.load_state_dict(ours.state_dict())
    again = GroupedAdamW(config(), resumed.parameters())
    again.load_state_dict(optimizer.state_dict())
    step(resumed, again, 2)
    step(theirs, expected, 2)
    assert_equal_parameters(resumed, theirs)


def test_a_resumed_run_keeps_its_own_settings() -> None:
    saved = GroupedAdamW(config(lr=9.0, decay=0.9), small_model().parameters()).state_dict()
    optimizer = GroupedAdamW(config(), small_model().parameters())
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    after = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert after == before
    assert optimizer.get_lr() == 0.05


def test_set_lr_keeps_the_scales() -> None:
    optimizer = GroupedAdamW(config(), small_model().parameters())
    for lr in (0.05, 0.0, 0.2):
        optimizer.set_lr(lr)
        assert optimizer.get_lr() == lr
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([lr / 4, lr / 4, lr, lr])
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.0, 0.3, 0.3]


def test_parameters_without_overrides_form_one_plain_group() -> None:
    model = nn.Linear(2, 2)
    (group,) = GroupedAdamW(config(), model.parameters()).param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.05, 0.3, 2)
    assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5


def test_a_student_trains_in_as_many_groups_as_there_are_scales() -> None:
    model = Trained()
    optimizer = GroupedAdamW(config(), model.parameters())
    found = {(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {(rate, decay) for rate in (0.2, 0.5, 1.0) for decay in (0.0, 0.3)}
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())

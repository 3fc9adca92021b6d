"""AdamW over groups of parameters, against torch's own."""

import pytest
import torch
from torch import nn

from emkum.errors import UserError
from user_dir.optimizers import GroupedAdamW, GroupedAdamWConfig, describe_groups


def config(lr: float = 0.05, decay: float = 0.3) -> GroupedAdamWConfig:
    return GroupedAdamWConfig(adamw_beta1=0.8, adamw_beta2=0.9, adamw_eps=1e-5, adamw_weight_decay=decay, lr=[lr])


def small_model(seed: int = 0) -> nn.Sequential:
    """Parameters of four groups: two factors of the learning rate, with and without decay."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for layer, rate in ((model[0], 0.25), (model[2], 1.0)):
        for name, decay in (("weight", 1.0), ("bias", 0.0)):
            getattr(layer, name).optim_overrides = {"optimizer": {"lr_scale": rate, "weight_decay_scale": decay}}
    return model


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


def test_a_state_of_other_groups_is_refused() -> None:
    saved = GroupedAdamW(config(), nn.Linear(4, 8).parameters()).state_dict()
    with pytest.raises(UserError, match="other groups of parameters.*--freeze.*--reset-optimizer"):
        GroupedAdamW(config(), small_model().parameters()).load_state_dict(saved)


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


def test_groups_are_described_by_their_parts_in_order_and_once() -> None:
    two, three = nn.Linear(2, 2, bias=False).weight, nn.Linear(3, 3).bias
    two.optim_overrides = {"optimizer": {}, "part": "heads"}
    groups = {(0.5, 1.0): [two, three, two], (1.0, 0.0): [three]}
    assert [" ".join(line.split()) for line in describe_groups(groups, 0.2)] == [
        "group of 11 parameters, lr x 0.5 weight decay 0.2 heads, unnamed",
        "group of 3 parameters, lr x 1 weight decay 0 unnamed",
    ]

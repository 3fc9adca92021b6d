"""The moving average against a loop over numbers, and its memory of updates."""

import copy

import pytest
import torch
from torch import nn

from emkum.layers.ema import EmaCopy


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def moved(module: nn.Module, by: float) -> nn.Module:
    with torch.no_grad():
        for value in module.state_dict().values():
            value.add_(int(by) if not value.is_floating_point() else by)
    return module


def test_it_follows_at_each_update() -> None:
    live = model()
    average = EmaCopy(live, 0.75)
    expected = {name: value.clone().double() for name, value in live.state_dict().items()}
    for update in range(1, 6):
        moved(live, update)
        average.follow(live, update)
        for name, value in live.state_dict().items():
            decay = 0.75 if value.is_floating_point() else 0.0
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert int(average.updates) == 5


@pytest.mark.parametrize("again", [3, 2, 0])
def test_once_an_update_however_often_it_is_called(again: int) -> None:
    live = model()
    average = EmaCopy(live, 0.5)
    average.follow(moved(live, 1), 3)
    before = copy.deepcopy(average.module.state_dict())
    average.follow(moved(live, 1), again)
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())


def test_a_run_that_starts_anew_from_a_checkpoint_moves_it_from_the_first_update_on() -> None:
    live = model()
    average = EmaCopy(live, 0.5)
    average.follow(moved(live, 1), 100)
    before = copy.deepcopy(average.module.state_dict())
    average.follow(live, 0)
    assert all(torch.equal(value, before[name]) for name, value in average.module.state_dict().items())
    average.follow(moved(live, 1), 1)
    assert any(not torch.equal(value, before[name]) for name, value in average.module.state_dict().items())
    assert int(average.updates) == 1


def test_it_stays_in_full_precision_beside_a_half_precision_model() -> None:
    live = torch.nn.Linear(2, 2)
    average = EmaCopy(live, 0.999)
    both = torch.nn.ModuleList([live, average]).half()
    assert both[0].weight.dtype == torch.float16 and average.module.weight.dtype == torch.float32
    before = average.module.weight.clone()
    with torch.no_grad():
        live.weight += 0.01
    average.follow(live, 1)
    torch.testing.assert_close(average.module.weight, before.lerp(live.weight.float(), 0.001), rtol=0, atol=1e-7)
    assert not torch.equal(average.module.weight, before)


def test_a_restored_average_knows_its_updates() -> None:
    live = model()
    average = EmaCopy(live, 0.5)
    average.follow(moved(live, 1), 4)
    restored = EmaCopy(model(), 0.5)
    # As fairseq does: the number of updates comes before the weights.
    restored.follow(live, 4)
    restored.load_state_dict(average.state_dict())
    restored.follow(moved(live, 1), 4)
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in restored.state_dict().items())
    restored.follow(live, 5)
    average.follow(live, 5)
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in restored.state_dict().items())


def test_it_is_never_trained() -> None:
    live = model()
    average = EmaCopy(live, 0.5)
    average.train()
    assert not any(module.training for module in average.modules())
    assert live.training and not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in live.parameters())
    ones = torch.ones(2, 3)
    assert torch.equal(average.module(ones), average.module(ones))

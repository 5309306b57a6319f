from __future__ import annotations

import torch
from torch import nn

from cl_dist.sharding.gathers import GatherSchedule, persistent_parameters

SETTINGS = {
    "stage3_param_persistence_threshold": 10,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
BYTES = 4 * (6 * 4 + 5 * 6)
"""Of the two matrices; 24 and 30 elements are multiples of 2 and 3."""


def model() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))


def step(net: nn.Module, schedule: GatherSchedule) -> int:
    schedule.gathers.clear()
    torch.autograd.backward(net(torch.empty(2, 4, device="meta", requires_grad=True)).sum())
    schedule.end_micro_batch()
    schedule.end_step()
    return schedule.gathers.fetched


def steady(settings: dict[str, int], world: int = 2) -> tuple[int, int]:
    """Bytes gathered in a step once DeepSpeed knows the order of the modules, and the most that was held."""
    net, held = model(), [0]
    schedule = GatherSchedule(net, world, settings, lambda size: held.append(held[-1] + size))
    with schedule.installed():
        for _ in range(3):
            del held[:-1]  # the most of the last step, not of those in which DeepSpeed learns the order
            fetched = step(net, schedule)
    assert held[-1] == 0
    return fetched, max(held)


def test_everything_is_gathered_twice_except_what_forward_ends_with() -> None:
    fetched, most = steady(SETTINGS)
    assert 2 * BYTES - 4 * 30 <= fetched <= 2 * BYTES
    assert most == 4 * 30  # one layer at a time


def test_what_is_used_again_soon_is_kept() -> None:
    assert steady({**SETTINGS, "stage3_max_reuse_distance": 10**9}) == (BYTES, BYTES)


def test_padding_is_gathered_too() -> None:
    fetched, _ = steady({**SETTINGS, "stage3_max_reuse_distance": 10**9}, world=7)
    assert fetched == 4 * (28 + 35)


def test_a_gather_of_several_parameters_needs_its_buffer_and_their_copies() -> None:
    every = {**SETTINGS, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 10**9}
    _, most = steady(every)
    assert most > BYTES + 4 * (6 + 6)  # the biases have 6 and 5 elements, padded


def test_small_parameters_stay_until_the_limit_for_all_of_them() -> None:
    net = model()
    biases = [net[0].bias, net[1].bias]
    assert [id(each) for each in persistent_parameters(net, SETTINGS)] == [id(each) for each in biases]
    limited = {**SETTINGS, "stage3_model_persistence_threshold": 8}
    assert [id(each) for each in persistent_parameters(net, limited)] == [id(biases[0])]


def test_the_model_is_as_it_was() -> None:
    net = model()
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    schedule = GatherSchedule(net, 2, SETTINGS)
    with schedule.installed():
        step(net, schedule)
    assert all(not vars(parameter) for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    left = {"ds_id", "ds_recompute_parameters", "ds_grads_remaining", "_external_params", "all_parameters"}
    left |= {"ds_external_parameters"}
    assert all(set(vars(module)) - before[name] <= left for name, module in net.named_modules())


class Lender(nn.Module):
    """Returns its weight, as DeBERTa's relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))

    def forward(self) -> torch.Tensor:
        return self.weight


class Borrower(nn.Module):
    """Uses a weight of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.lent = nn.Linear(4, 4, bias=False), Lender()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.own(x) @ self.lent()
        return result


def test_a_weight_that_another_module_uses_is_gathered() -> None:
    with torch.device("meta"):
        net = nn.Sequential(Borrower(), nn.Linear(4, 4, bias=False))
    schedule = GatherSchedule(net, 2, {**SETTINGS, "stage3_max_reuse_distance": 10**9})
    with schedule.installed():
        assert [step(net, schedule) for _ in range(3)][-1] == 3 * 4 * 16

"""Index arithmetic of batches, by its properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.tasks.plan import FILLER, MEGABATCH, BatchPlan, Cycles, InterleavedPlan, share

PLANS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 50), min_size=1, max_size=70),
        "micro_batch_size": st.integers(1, 4),
        "gradient_accumulation": st.integers(1, 3),
        "ranks": st.integers(1, 4),
        "epochs": st.integers(1, 3),
        "max_steps": st.none() | st.integers(1, 20),
        "shuffle": st.booleans(),
        "group_by_length": st.booleans(),
        "seed": st.integers(0, 3),
    }
)


def make_plan(**changes: Any) -> BatchPlan:
    """A plan of 10 samples, one rank, batches of 4, in file order."""
    defaults: dict[str, Any] = {
        "lengths": [1] * 10, "micro_batch_size": 4, "gradient_accumulation": 1, "ranks": 1, "epochs": 1,
        "max_steps": None, "shuffle": False, "group_by_length": False, "seed": 0,
    }  # fmt: skip
    return BatchPlan(**{**defaults, **changes})


@given(PLANS)
def test_every_sample_once_an_epoch(arguments: dict[str, Any]) -> None:
    plan = BatchPlan(**{**arguments, "max_steps": None})
    for epoch in range(arguments["epochs"]):
        first = epoch * plan.steps_per_epoch
        batches = [plan.step(step) for step in range(first, first + plan.steps_per_epoch)]
        assert sorted(i for batch in batches for i in batch) == list(range(len(arguments["lengths"])))
        assert {len(batch) for batch in batches[:-1]} <= {plan.global_batch_size}


@given(PLANS)
def test_ranks_have_equal_shapes_and_together_the_global_batch(arguments: dict[str, Any]) -> None:
    plan = BatchPlan(**arguments)
    for step in range(plan.steps):
        ranks = [plan.micro_batches(step, rank) for rank in range(arguments["ranks"])]
        assert all(len(micro_batches) == arguments["gradient_accumulation"] for micro_batches in ranks)
        assert plan.filled(step) == sum(max(piece) >= 0 for micro_batches in ranks for piece in micro_batches)
        assert {len(micro) for rank in ranks for micro in rank} == {arguments["micro_batch_size"]}
        assert [i for rank in ranks for micro in rank for i in micro if i != FILLER] == plan.step(step)


@given(PLANS)
def test_short_batch_is_spread_evenly(arguments: dict[str, Any]) -> None:
    plan = BatchPlan(**arguments)
    ranks = [plan.micro_batches(plan.steps - 1, rank) for rank in range(arguments["ranks"])]
    counts = [sum(i != FILLER for micro in rank for i in micro) for rank in ranks]
    assert max(counts) - min(counts) <= 1
    for rank in ranks:
        sizes = [sum(i != FILLER for i in micro) for micro in rank]
        assert max(sizes) - min(sizes) <= 1
        assert all(FILLER not in micro[:size] for micro, size in zip(rank, sizes, strict=True))


@given(PLANS, st.randoms(use_true_random=False))
def test_steps_can_be_requested_in_any_order(arguments: dict[str, Any], rng: Any) -> None:
    plan = BatchPlan(**arguments)
    in_order = [plan.step(step) for step in range(plan.steps)]
    steps = list(range(plan.steps))
    rng.shuffle(steps)
    assert [plan.step(step) for step in steps] == [in_order[step] for step in steps]
    assert BatchPlan(**arguments).step(plan.steps - 1) == in_order[-1]


@given(PLANS, st.integers(1, 3))
def test_only_the_product_determines_the_global_batch(arguments: dict[str, Any], factor: int) -> None:
    plan = BatchPlan(**{**arguments, "gradient_accumulation": arguments["gradient_accumulation"] * factor})
    other = BatchPlan(**{**arguments, "ranks": arguments["ranks"] * factor})
    assert [plan.step(step) for step in range(plan.steps)] == [other.step(step) for step in range(other.steps)]


@given(PLANS, st.data())
def test_changing_the_split_during_a_run_keeps_every_sample_in_its_step(
    arguments: dict[str, Any], data: st.DataObject
) -> None:
    """The samples of all ranks and micro-batches, step by step, whatever splits of the global batch come and go."""
    plan = BatchPlan(**arguments)
    size = plan.global_batch_size
    splits = [(r, m) for r in range(1, size + 1) for m in range(1, size + 1) if size % (r * m) == 0]
    seen: list[list[int]] = []
    while len(seen) < plan.steps:
        ranks, micro = data.draw(st.sampled_from(splits))
        split = {"ranks": ranks, "micro_batch_size": micro, "gradient_accumulation": size // (ranks * micro)}
        resumed = BatchPlan(**{**arguments, **split})
        assert resumed.steps == plan.steps
        for step in range(len(seen), data.draw(st.integers(len(seen) + 1, plan.steps))):
            pieces = [piece for rank in range(ranks) for piece in resumed.micro_batches(step, rank)]
            seen.append([index for piece in pieces for index in piece if index != FILLER])
    assert seen == [plan.step(step) for step in range(plan.steps)]


def test_file_order_takes_consecutive_samples_and_splits_them_over_ranks() -> None:
    plan = make_plan(ranks=2, micro_batch_size=2, gradient_accumulation=1)
    assert [plan.step(step) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [plan.micro_batches(0, rank) for rank in (0, 1)] == [[[0, 1]], [[2, 3]]]
    assert [plan.micro_batches(2, rank) for rank in (0, 1)] == [[[8, FILLER]], [[9, FILLER]]]


def test_epochs_differ_and_seeds_differ() -> None:
    plan = make_plan(lengths=[1] * 100, epochs=2, shuffle=True)
    other = make_plan(lengths=[1] * 100, epochs=2, shuffle=True, seed=1)
    assert plan.step(0) != plan.step(plan.steps_per_epoch)
    assert plan.step(0) != other.step(0)
    assert plan.step(0) != [0, 1, 2, 3]


def test_steps_are_capped() -> None:
    assert make_plan(epochs=3).steps == 9
    assert make_plan(epochs=3, max_steps=5).steps == 5
    assert make_plan(epochs=3, max_steps=50).steps == 9
    with pytest.raises(IndexError, match="step 5 of 5"):
        make_plan(epochs=3, max_steps=5).step(5)


def test_grouped_batches_hold_similar_lengths_in_random_order() -> None:
    lengths = [(i * 7919) % 200 for i in range(200)]
    plan = make_plan(lengths=lengths, shuffle=True, group_by_length=True)
    batches = [[lengths[i] for i in plan.step(step)] for step in range(plan.steps)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)
    assert batches != sorted(batches, reverse=True)


def test_grouping_sorts_no_further_than_a_megabatch() -> None:
    lengths = list(range(4 * MEGABATCH * 2))
    plan = make_plan(lengths=lengths, shuffle=True, group_by_length=True)
    assert any(max(batch) - min(batch) > 3 for batch in (plan.step(step) for step in range(plan.steps)))


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        make_plan(lengths=[])


@given(st.lists(st.integers(), max_size=30), st.integers(1, 7))
def test_shares_are_consecutive_and_even(items: list[int], parts: int) -> None:
    pieces = [share(items, parts, number) for number in range(parts)]
    assert [item for piece in pieces for item in piece] == items
    assert [len(piece) for piece in pieces] == sorted((len(piece) for piece in pieces), reverse=True)
    assert len(pieces[0]) - len(pieces[-1]) <= 1


def test_samples_are_ordered_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the order of 100,000 samples anew for each step takes many seconds."""
    drawn: list[int] = []
    draw = BatchPlan._draw_order
    monkeypatch.setattr(BatchPlan, "_draw_order", lambda plan, epoch: drawn.append(epoch) or draw(plan, epoch))
    plan = make_plan(lengths=range(1_000), epochs=2, shuffle=True, group_by_length=True)
    for step in range(plan.steps):
        plan.micro_batches(step, 0)
    assert drawn == [0, 1]


@given(own=st.integers(1, 60), inner=st.integers(1, 9), outer=st.integers(1, 5))
def test_cycles_take_every_step_of_both_kinds_once(own: int, inner: int, outer: int) -> None:
    cycles = Cycles(own, inner, outer)
    located = [cycles.locate(step) for step in range(cycles.steps)]
    assert [number for past, number in located if not past] == list(range(own))
    assert [number for past, number in located if past] == list(range(cycles.outer_steps))
    # Written out: `inner` own steps (the last time what is left), `outer` past ones.
    expected: list[tuple[bool, bool, bool, bool]] = []
    left = own
    while left:
        now = min(inner, left)
        own_steps = [(False, number == 0, False, False) for number in range(now)]
        past_steps = [(True, False, number == 0, number == outer - 1) for number in range(outer)]
        expected += own_steps + past_steps
        left -= now
    steps = range(cycles.steps)
    assert expected == [(located[s][0], cycles.starts(s), cycles.turns(s), cycles.ends(s)) for s in steps]


@given(own=st.integers(1, 60), inner=st.integers(1, 9), outer=st.integers(1, 5))
def test_a_short_last_cycle_may_go_without_past_steps(own: int, inner: int, outer: int) -> None:
    fused, plain = Cycles(own, inner, outer), Cycles(own, inner, outer, last=False)
    left = own % inner
    assert plain.steps == fused.steps - (outer if left else 0)
    for step in range(plain.steps):
        assert plain.locate(step) == fused.locate(step)
        assert (plain.starts(step), plain.turns(step), plain.ends(step)) == (
            fused.starts(step), fused.turns(step), fused.ends(step),
        )  # fmt: skip
    assert plain.ends(plain.steps - 1) == (left == 0)


@given(own=st.integers(1, 60), inner=st.integers(1, 9), outer=st.integers(1, 5), last=st.booleans())
def test_a_schedule_over_own_steps_pauses_during_past_ones(own: int, inner: int, outer: int, last: bool) -> None:
    cycles = Cycles(own, inner, outer, last, scheduled=False)
    places, done = [], 0
    for step in range(cycles.steps):
        past, _ = cycles.locate(step)
        places.append((done, own))
        done += not past
    assert [cycles.schedule(step) for step in range(cycles.steps)] == places
    everything = Cycles(own, inner, outer, last)
    assert [everything.schedule(s) for s in (0, everything.steps - 1)] == [
        (0, everything.steps), (everything.steps - 1, everything.steps),
    ]  # fmt: skip


def test_interleaved_plan_numbers_past_samples_after_own_ones() -> None:
    own, past = make_plan(micro_batch_size=2, ranks=2, max_steps=3), make_plan(lengths=[1] * 3, ranks=2, epochs=2)
    plan = InterleavedPlan(own, past, Cycles(own=3, inner=2, outer=1), first_past=10)
    assert [plan.step(step) for step in range(plan.steps)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12], [8, 9], [10, 11, 12],
    ]  # fmt: skip
    assert plan.micro_batches(2, rank=1) == [[12, FILLER, FILLER, FILLER]]
    assert plan.micro_batches(3, rank=0) == own.micro_batches(2, rank=0)
    assert [plan.filled(2), plan.filled(3)] == [past.filled(0), own.filled(2)]
    with pytest.raises(IndexError):
        plan.step(plan.steps)

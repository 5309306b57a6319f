"""What else would fit, what would be fastest, and how long the whole stream takes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist.planning.devices import EFFICIENCY, find_device
from cl_dist.planning.memory import plan_memory
from cl_dist.planning.plan import Plan, Planner, preferred
from cl_dist.planning.report import contradictions, lines, table
from cl_dist.planning.shape import describe_model
from cl_dist.planning.stream_time import StreamSize, TaskSize, size_of
from cl_dist.tasks.stream import load_stream
from tests.planning.conftest import Planned


def planner(planned: Planned, *changes: str, device: str = "h100", memory: int | None = None, **ranks: int) -> Planner:
    """A planner of the quickstart with its generated data."""
    setup, shape = planned(*changes, **ranks)
    stream = size_of(setup.recipe, shape, load_stream(setup.recipe.stream, Path("."), setup.recipe.train), None)
    entry = find_device(device)
    entry = entry if memory is None else replace(entry, memory=memory)
    return Planner(setup, shape, entry, stream, describe_model)


@pytest.fixture(scope="module")
def alternatives(planned: Planned) -> list[Plan]:
    """Those of a global batch of 16 on 4 ranks."""
    return planner(planned, "train.micro_batch_size=2", "train.gradient_accumulation=2", ranks=4).alternatives()


def test_alternatives_keep_the_global_batch(alternatives: list[Plan]) -> None:
    for plan in alternatives:
        train = plan.setup.recipe.train
        assert train.micro_batch_size * train.gradient_accumulation * plan.setup.world == 16


def test_there_is_one_for_every_stage_offload_and_checkpointing(alternatives: list[Plan]) -> None:
    kinds = {
        (p.setup.stage, p.setup.recipe.zero.offload, p.setup.recipe.train.activation_checkpointing)
        for p in alternatives
    }
    assert len(kinds) == len(alternatives) == 14
    assert not any(plan.setup.stage == 0 and plan.setup.recipe.zero.offload for plan in alternatives)


def test_the_first_is_recommended_and_worked_out_exactly(alternatives: list[Plan]) -> None:
    best, *rest = alternatives
    assert best.fits
    assert best.time.seconds <= 1.03 * min(plan.time.seconds for plan in rest)
    times = [plan.time.seconds for plan in rest]
    assert times == sorted(times)
    shape = describe_model(best.setup.recipe)
    assert best.memory == plan_memory(best.setup, shape)


def test_memory_between_two_traced_micro_batches_is_close(planned: Planned) -> None:
    plans = planner(planned, "train.micro_batch_size=32", ranks=2)
    found = {plan.setup.recipe.train.micro_batch_size: plan for plan in plans._micro_batches(2, False, False)}
    assert set(found) == {1, 2, 4, 8, 16, 32}
    for size in (1, 8, 16, 32):
        exact = plans.plan(found[size].setup).memory.device_peak
        assert found[size].memory.device_peak == pytest.approx(exact, rel=0.0 if size in (1, 32) else 0.15)


def test_what_does_not_fit_says_why(planned: Planned) -> None:
    small = planner(planned, "train.micro_batch_size=1", memory=2 * 10**6)
    own = small.plan(small.setup)
    assert not own.fits
    assert "NVIDIA H100 SXM gives it 0.00 GiB" in own.obstacles[0]
    others = small.alternatives()
    assert not any(plan.fits for plan in others)
    assert preferred(others) is others[0]
    assert others[0].device_bytes == min(plan.device_bytes for plan in others)
    text = "\n".join(lines(small, own, others, None, None, "small", wide=True))
    assert "does not fit   a rank needs" in text
    assert "nothing here fits: use more devices, or larger ones" in text


def test_a_wide_terminal_shows_more(alternatives: list[Plan]) -> None:
    narrow, wide = (list(table(alternatives, alternatives[0], wide=wide)) for wide in (False, True))
    assert max(map(len, narrow)) <= 80 < max(map(len, wide)) <= 120
    assert narrow[1].startswith("* ")
    assert "host GiB" in wide[0]


def test_the_ranks_of_a_cpu_share_its_memory(planned: Planned) -> None:
    need = planner(planned, device="cpu", ranks=1)
    memory = 4 * need.plan(need.setup).device_bytes
    one, many = (planner(planned, device="cpu", memory=memory, ranks=ranks) for ranks in (1, 8))
    assert one.plan(one.setup).fits
    assert not many.plan(many.setup).fits


def test_a_stream_takes_its_steps_evaluations_and_checkpoints(planned: Planned) -> None:
    plans = planner(planned, "train.epochs=3", "checkpoint.every_steps=10", ranks=2)
    own = plans.plan(plans.setup)
    assert isinstance(plans.stream, StreamSize)
    assert own.stream is not None
    per_task = [3 * -(-task.train // 16) for task in plans.stream.tasks]
    assert own.stream.steps == sum(per_task)
    saves = sum(1 + steps // 10 for steps in per_task)
    assert own.stream.checkpoints == pytest.approx(saves * own.checkpoint_bytes / EFFICIENCY.storage)
    assert own.stream.hours == pytest.approx(
        (own.stream.training + own.stream.evaluation + own.stream.checkpoints) / 3600
    )


def test_fewer_rows_of_the_matrix_take_less_time(planned: Planned) -> None:
    full, seen = (
        planner(planned, f"eval.tasks={tasks}", f"eval.before_training={before}")
        for tasks, before in (("all", "true"), ("seen", "false"))
    )
    times = [each.plan(each.setup).stream for each in (full, seen)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1].evaluation == pytest.approx(times[0].evaluation * (1 + 2 + 3 + 4) / (5 * 4), rel=0.2)


def test_without_data_the_stream_is_as_long_as_asked(planned: Planned) -> None:
    setup, shape = planned()
    assert size_of(setup.recipe, shape, "there is no data", None) == "there is no data"
    stream = size_of(setup.recipe, shape, "there is no data", 500)
    assert isinstance(stream, StreamSize)
    assert not stream.measured
    assert stream.tasks[0] == TaskSize("spring", 500, 0, 64, 8)
    assert stream.train == 2000


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_plan_does_not_depend_on_what_was_planned_before(planned: Planned, first: int) -> None:
    """Stage 1 has buckets that stage 0 lacks, and offload takes gradients away at stage 2."""
    plans = planner(planned, "train.dtype=bfloat16", "zero.stage=2", ranks=4)
    plans.plan(plans.setup.varied(stage=first))
    shape = describe_model(plans.setup.recipe)
    for stage, offload in ((0, False), (1, False), (2, False), (2, True)):
        setup = plans.setup.varied(stage=stage, offload=offload)
        assert plans.plan(setup).memory == plan_memory(setup, shape), (stage, offload)


def test_another_split_is_not_considered_if_it_would_train_something_else(planned: Planned) -> None:
    changes = ("method={name: migu, mask_scope: micro_batch}", "train.micro_batch_size=4")
    found = planner(planned, *changes, "train.gradient_accumulation=2", ranks=2).alternatives()
    assert len(found) == 14
    assert {plan.setup.recipe.train.micro_batch_size for plan in found} == {4}


def test_the_precision_of_gradients_stays_that_of_the_recipe(planned: Planned) -> None:
    raw = "zero.deepspeed={communication_data_type: fp32, zero_optimization: {parameter_alignment: true}}"
    setup, _ = planned(raw, "train.dtype=bfloat16", ranks=2)
    assert setup.varied(stage=1).recipe.zero.deepspeed == setup.recipe.zero.deepspeed
    assert setup.varied(stage=3).recipe.zero.deepspeed == {"communication_data_type": "fp32"}
    assert setup.varied(stage=3).communication_itemsize == 4


def steps_of(planned: Planned, *changes: str) -> int:
    plans = planner(planned, *changes, "train.epochs=1", "train.micro_batch_size=1", ranks=1)
    own = plans.plan(plans.setup).stream
    assert own is not None
    return own.steps


def test_steps_on_past_samples_are_counted(planned: Planned) -> None:
    plain = steps_of(planned)
    count = plain // 4
    assert plain == 4 * count
    assert steps_of(planned, "method={name: replay, ratio: 0.5}") == plain + (1 + 2 + 3) * math.ceil(count / 2)
    reservoir = "method={name: replay, policy: reservoir, memory_size: 5}"
    assert steps_of(planned, reservoir) == plain + 3 * 5
    assert steps_of(planned, "method={name: kif, replay_ratio: 0.5}") == plain + 6 * math.ceil(count / 2)
    assert steps_of(planned, "method={name: multi_task}") == plain
    cycles = "method={name: recurrent_kif, inner_steps: 7, outer_steps: 2, units: matrix}"
    assert steps_of(planned, cycles) == plain + 3 * 2 * math.ceil(count / 7)
    assert steps_of(planned, cycles.replace("}", ", fuse_last_cycle: false}")) == plain + 3 * 2 * (count // 7)


def test_states_are_saved_by_time_too(planned: Planned) -> None:
    often, never = (
        planner(planned, "checkpoint.every_steps=null", f"checkpoint.every_minutes={minutes}", ranks=1)
        for minutes in ("0.00001", "null")
    )
    times = [each.plan(each.setup).stream for each in (often, never)]
    assert times[0] is not None
    assert times[1] is not None
    assert times[0].checkpoints > 10 * times[1].checkpoints


def test_weights_are_gathered_for_generation_as_the_recipe_says(planned: Planned) -> None:
    seconds = {}
    for policy in ("auto", "always", "never"):
        changes = ("zero.stage=3", "eval.mode=generate", f"eval.gather_weights={policy}")
        plans = planner(planned, *changes, ranks=2)
        own = plans.plan(plans.setup).stream
        assert own is not None
        seconds[policy] = own.evaluation
    assert seconds["auto"] == seconds["always"] < seconds["never"]


def test_contradictions_between_recipe_and_command_are_named(planned: Planned) -> None:
    plans = planner(planned, "launch.processes=3", "launch.device=cpu", ranks=2)
    notes = contradictions(plans.plan(plans.setup))
    assert notes[0] == "launch.processes is 3 in the recipe; planned with 2 a node"
    assert notes[1] == "launch.device is cpu in the recipe; planned for NVIDIA H100 SXM"
    agreed = planner(planned, "launch.processes=auto", "launch.device=cuda", ranks=2)
    assert contradictions(agreed.plan(agreed.setup)) == []

from __future__ import annotations

import math

import pytest

from cl_dist.methods.agem.config import AgemConfig
from cl_dist.methods.cost import Collective
from cl_dist.methods.gmt.config import GmtConfig
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.mofo.config import MofoConfig
from cl_dist.methods.sparse_memory.config import SparseMemoryConfig
from cl_dist.planning.wire import on_the_link, plan_wire
from tests.planning.models import planned


def test_a_ring_passes_on_every_piece_but_one() -> None:
    assert Collective("all_reduce", 400, "x").on_the_link(4) == 600
    assert Collective("all_gather", 400, "x").on_the_link(4) == 300
    assert Collective("reduce_scatter", 400, "x").on_the_link(4) == 300
    assert on_the_link([Collective("broadcast", 400, "x"), Collective("reduce", 400, "x")], 2) == 400


def test_nothing_leaves_a_single_rank() -> None:
    assert plan_wire(*planned(1, 2)).step_bytes == 0


def test_gradients_and_weights_of_stages_0_to_2() -> None:
    found = {stage: plan_wire(*planned(2, stage, dtype="bfloat16")).step for stage in (0, 1, 2)}
    _, shape = planned()
    gradients = Collective("all_reduce", 2 * shape.numel, "gradients")
    assert found[0] == (gradients,)
    assert [each[0] for each in (found[1], found[2])] == [gradients] * 2
    for stage in (1, 2):
        assert found[stage][1].kind == "all_gather"
        assert 2 * shape.numel <= found[stage][1].bytes < 2 * shape.numel + 20


def test_stage_2_reduces_every_micro_batch() -> None:
    once, thrice = (plan_wire(*planned(2, 2, gradient_accumulation=count)).step for count in (1, 3))
    assert thrice[0].bytes == 3 * once[0].bytes
    assert thrice[1] == once[1]


def test_stage_3_gathers_once_what_it_keeps_and_twice_what_it_releases() -> None:
    keep = {"stage3_param_persistence_threshold": 0}
    release = {**keep, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    kept, released = (plan_wire(*planned(2, 3, zero=zero)).step for zero in (keep, release))
    _, shape = planned()
    assert kept[0].bytes == shape.nbytes
    # The output head ends the forward pass and begins the backward pass.
    head = shape.trainable["lm_head.weight"].nbytes
    assert 2 * shape.nbytes - head <= released[0].bytes <= 2 * shape.nbytes
    assert kept[1] == released[1] == Collective("reduce_scatter", shape.nbytes, "gradients")


def test_what_the_methods_add_is_named_apart() -> None:
    setup, shape = planned(2, 2, lora=3)
    plain = plan_wire(setup, shape)
    assert plain.methods_step == plain.methods_task == ()
    methods = (MiguConfig(name="migu", compact="off"), KifConfig(name="kif"))
    wire = plan_wire(*planned(2, 2, lora=3, methods=methods))
    assert wire.step == plain.step
    magnitudes, penalty = wire.methods_step
    layers = sum("lora_" in name for name in shape.trainable)
    rows = sum(each.shape[0] for each in shape.trainable.values())
    assert magnitudes == Collective("all_reduce", 8 * (rows + 2 * layers + 2), "MIGU's magnitudes")
    assert penalty.bytes == sum(each.nbytes for each in shape.trainable.values())
    assert {each.what for each in wire.methods_task} == {"scores of units", "changed weights"}


def test_dropped_rows_do_not_travel() -> None:
    """Known before backward, at every stage; in the gather after the step only what no rank has moved."""
    _, shape = planned()
    of_rows = {name: each for name, each in shape.trainable.items() if len(each.shape) == 2 and ".layers." in name}
    dropped = sum(math.ceil(0.7 * (each.shape[0] - 1)) * each.shape[1] for each in of_rows.values())
    whole, kept = 4 * shape.numel, 4 * (shape.numel - dropped)
    for mask, gathered in (("gradient", whole), ("update", kept)):
        migu = [MiguConfig(name="migu", mask=mask)]
        for stage in (0, 1, 2, 3):
            step = {each.what: each for each in plan_wire(*planned(2, stage, methods=migu)).step}
            assert step["gradients"].bytes == kept
            if stage in (1, 2):
                assert step["updated weights"].bytes == pytest.approx(gathered, abs=20)
    late = plan_wire(*planned(2, 2, methods=[MiguConfig(name="migu", mask="update")], gradient_accumulation=3)).step
    assert [each.bytes for each in late] == [3 * whole, kept]
    cut = {"contiguous_gradients": False}
    assert plan_wire(*planned(2, 2, methods=[MiguConfig(name="migu")], zero=cut)).step[0].bytes == whole


def test_gradients_that_a_method_measures_are_whole() -> None:
    wire = plan_wire(*planned(2, 2, methods=[MiguConfig(name="migu"), AgemConfig(name="agem")]))
    assert wire.methods_step[: len(wire.step)] == plan_wire(*planned(2, 2)).step != wire.step


def test_choosing_elements_adds_up_counts() -> None:
    """256 counts of eight bytes per parameter in each of four sums; MoFO asks for each of AdamW's two groups."""
    _, shape = planned()
    matrices = sum(len(each.shape) == 2 for each in shape.trainable.values())
    for config, parameters, searches in (
        (GmtConfig(name="gmt"), len(shape.trainable), 1),
        (MofoConfig(name="mofo"), matrices, 2),
    ):
        [counts] = plan_wire(*planned(2, 3, methods=[config])).methods_step
        calls = 4 * searches
        assert counts == Collective("all_reduce", calls * 256 * 8 * parameters, f"{config.name}'s counts", calls)
        assert plan_wire(*planned(2, 0, methods=[config])).methods_step == ()


def test_sparse_memory_adds_up_the_uses_of_every_row() -> None:
    config = SparseMemoryConfig(name="sparse_memory", background="unread")
    [counts] = plan_wire(*planned(2, 3, methods=[config])).methods_step
    assert counts == Collective("all_reduce", 128 * 8, "sparse_memory's counts")


def test_the_precision_of_the_sum_is_that_on_the_network() -> None:
    for stage in (0, 1, 2, 3):
        low, high = (
            plan_wire(*planned(2, stage, dtype="bfloat16", grad_dtype=grad_dtype)).step
            for grad_dtype in (None, None if stage == 0 else "float32")
        )
        sizes = [{each.what: each.bytes for each in step} for step in (low, high)]
        factor = 1 if stage == 0 else 2
        assert sizes[1]["gradients"] == pytest.approx(factor * sizes[0]["gradients"], abs=20)
        assert {**sizes[1], "gradients": 0} == {**sizes[0], "gradients": 0}


def test_flat_tensors_are_gathered_with_their_padding() -> None:
    setup, shape = planned(7, 2, lora=3)
    trained = sum(each.numel for each in shape.trainable.values())
    assert trained % 14 == 2
    assert plan_wire(setup, shape).step[1].bytes == 4 * (trained + 12)


def test_settings_of_deepspeed_choose_the_collective() -> None:
    _, shape = planned()
    to_owners = plan_wire(*planned(2, 2, zero={"use_multi_rank_bucket_allreduce": False})).step
    assert to_owners[0] == Collective("reduce", shape.nbytes, "gradients")
    whole = {"reduce_scatter": False, "stage3_param_persistence_threshold": 0}
    stage_3 = plan_wire(*planned(2, 3, zero=whole, gradient_accumulation=3)).step
    assert stage_3[1] == Collective("all_reduce", 3 * shape.nbytes, "gradients", 3)
    fetched = plan_wire(*planned(2, 3, zero={**whole, "stage3_use_all_reduce_for_fetch_params": True})).step
    assert [each.kind for each in fetched] == ["all_reduce", "all_reduce"]


def test_stage_3_scatters_every_micro_batch_and_gathers_small_weights_after_the_step() -> None:
    once, thrice = (
        plan_wire(*planned(2, 3, zero={"stage3_param_persistence_threshold": 64}, gradient_accumulation=count)).step
        for count in (1, 3)
    )
    assert thrice[1].bytes == 3 * once[1].bytes
    assert once[2] == thrice[2] == Collective("all_gather", 4 * 5 * 64, "small weights after the step")


def test_further_passes_communicate_as_the_step_does() -> None:
    wire = plan_wire(*planned(2, 2, methods=[AgemConfig(name="agem")]))
    assert wire.methods_step[: len(wire.step)] == wire.step

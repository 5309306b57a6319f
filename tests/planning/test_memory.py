from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cl_dist.kernels import kept_rows
from cl_dist.kernels.row_magnitude import fold_memory
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.sift.config import SiftConfig
from cl_dist.planning.memory import plan_memory
from cl_dist.planning.ranks import RankView
from cl_dist.tasks.samples import SELECTION_BYTES, pack, table_bytes
from cl_dist.tasks.types import IGNORE, Encoded
from tests.planning.models import llama, planned

FEW: dict[str, Any] = {"micro_batch_size": 1, "max_length": 4, "max_target_length": 2}
"""Tokens, so that activations do not make up the peak."""
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def test_sixteen_bytes_a_parameter_at_stage_0() -> None:
    """Rajbhandari et al. (arXiv 1910.02054, section 3.1): 2 + 2 + 12 bytes in mixed precision with Adam."""
    setup, shape = planned(stage=0, dtype="bfloat16")
    memory = plan_memory(setup, shape)
    n = shape.numel
    assert memory.held == {"weights": 2 * n + shape.buffer_bytes, "master": 4 * n, "moments": 8 * n}
    assert memory.gradients == 2 * n


def test_what_the_stages_shard() -> None:
    """The same, section 5: 4 + 12 / N bytes at stage 1, 2 + 14 / N at stage 2, 16 / N at stage 3."""
    world, held = 4, {}
    for stage in (1, 2, 3):
        zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        setup, shape = planned(world, stage, zero=zero, dtype="bfloat16")
        held[stage] = plan_memory(setup, shape)
    n, share = shape.numel, shape.numel / world
    for stage in (1, 2, 3):
        assert held[stage].held["master"] == pytest.approx(4 * share, rel=0.01)
        assert held[stage].held["moments"] == pytest.approx(8 * share, rel=0.01)
    assert held[1].held["weights"] == held[2].held["weights"] == pytest.approx(2 * n, rel=0.01)
    assert held[3].held["weights"] == pytest.approx(2 * share, rel=0.01)
    assert held[3].gradients == pytest.approx(2 * share, rel=0.01)
    # A parameter across a border counts whole: DeepSpeed keeps its gradient.
    assert 2 * share < held[2].gradients < 2 * 2 * share


def test_float32_weights_are_masters_only_at_stage_0() -> None:
    masters = [plan_memory(*planned(1, stage)).held.get("master", 0) for stage in range(4)]
    _, shape = planned()
    assert masters[0] == 0
    assert all(4 * shape.numel <= each < 4 * shape.numel + 100 for each in masters[1:])


def test_lora_needs_states_for_the_adapters_alone() -> None:
    setup, shape = planned(1, 2, lora=3)
    adapters = sum(each.numel for each in shape.trainable.values())
    memory = plan_memory(setup, shape)
    assert adapters < shape.numel / 5
    assert memory.held["master"] == 4 * adapters
    assert memory.disk["saved state"] == 12 * adapters
    assert memory.disk["model of each task"] == 4 * adapters


def test_offload_moves_the_optimiser_to_the_host() -> None:
    setup, shape = planned(2, 2)
    memory = plan_memory(setup.varied(offload=True), shape)
    assert not {"master", "moments"} & set(memory.held)
    rank = RankView(setup, shape)
    assert memory.host["master"] == memory.host["gradients"] == 4 * rank.owned
    assert memory.host["moments"] == 8 * rank.owned


def test_checkpointing_lowers_the_peak() -> None:
    zero = {"reduce_bucket_size": 10_000}
    settings = {"config": llama(**WIDE, num_hidden_layers=6), "max_length": 256, "stage": 2, "zero": zero}
    plain, recomputed = (
        plan_memory(*planned(**settings, activation_checkpointing=on)).device_peak for on in (False, True)
    )
    assert recomputed < 0.8 * plain


def test_many_ranks_hold_the_whole_gradient_of_what_they_own_a_sliver_of() -> None:
    setup, shape = planned(64, 2, config=llama(vocab_size=4096))
    rank = RankView(setup, shape)
    embedding = shape.trainable["model.embed_tokens.weight"].numel
    assert rank.owned < embedding / 20
    assert rank.step_gradients >= 4 * embedding


def test_tokenised_data_is_mapped_once_per_node() -> None:
    """As many bytes as the arrays of real samples take, shared by the ranks, besides their order."""
    count, setup = 500, replace(planned(4, 2)[0], samples=500)
    shape = planned(4, 2)[1]
    samples = [Encoded(number, [1] * 32, [IGNORE] * 28 + [1] * 4) for number in range(count)]
    table = pack(samples).nbytes
    found = plan_memory(setup, shape).host["tokenised data"] - SELECTION_BYTES * count
    assert found == pytest.approx(table / 4, rel=0.01)
    assert table_bytes(count, 32 * count, 0, vocabulary=128256) == table_bytes(count, 64 * count, 0, vocabulary=128)


def test_migu_holds_its_masks_and_on_a_gpu_the_sums_that_wait_to_be_folded() -> None:
    rows = [64, 64, 64, 64, 96, 96, 64] * 2
    held = {}
    for world, device in ((1, "cpu"), (2, "cpu"), (2, "cuda")):
        setup, shape = planned(world, device=device, methods=[MiguConfig(name="migu")])
        held[world, device] = plan_memory(setup, shape).held
    # The mask, the rows' numbers, and in how many steps each was kept.
    assert held[1, "cpu"]["MIGU's masks"] == (1 + 8 + 4) * sum(rows)
    # With others to agree with, a rank has a weight of four bytes for each row; and the numbers of those that travel.
    kept = sum(kept_rows(size, 0.7) for size in rows)
    assert held[2, "cpu"]["MIGU's masks"] == held[2, "cuda"]["MIGU's masks"] == (1 + 8 + 4 + 4) * sum(rows) + 8 * kept
    waiting = held[2, "cuda"]["MIGU's magnitudes"] - held[2, "cpu"]["MIGU's magnitudes"]
    assert waiting == fold_memory(2 * 32, rows) >= 4 * 2 * sum(rows)


def test_chosen_elements_are_all_that_has_gradients_masters_and_moments() -> None:
    dense = plan_memory(*planned(2, 2, methods=[SiftConfig(name="sift", keep=1.0)])).held
    some = plan_memory(*planned(2, 2, methods=[SiftConfig(name="sift", keep=0.05)])).held
    for part in ("master", "moments"):
        assert 0.05 * dense[part] <= some[part] <= 0.051 * dense[part]
    assert some["sift's elements"] == 2 * some["master"]  # four bytes each, on each of the two ranks


def test_gradients_that_are_summed_in_float32_take_four_bytes() -> None:
    small = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    for grad_dtype, size in ((None, 2), ("float32", 4)):
        setup, shape = planned(2, 3, zero=small, dtype="bfloat16", grad_dtype=grad_dtype)
        held, owned = plan_memory(setup, shape).held, RankView(setup, shape).owned
        assert (held["gradients"], held["communication buffers"]) == (size * owned, size * 1000)
    # At stage 1, DeepSpeed then keeps them whole on every rank (`BF16_Optimizer`).
    setup, shape = planned(2, 1, dtype="bfloat16", grad_dtype="float32")
    assert plan_memory(setup, shape).held["gradients"] == pytest.approx(4 * shape.numel, rel=0.01)


def test_stage_3_keeps_small_weights_whole_besides_its_share() -> None:
    setup, shape = planned(2, 3, zero={"stage3_param_persistence_threshold": 64})
    # The norms: two per block and the last one.
    assert plan_memory(setup, shape).held["weights"] == shape.nbytes // 2 + shape.buffer_bytes + 4 * 5 * 64


def test_offload_sums_whole_gradients_of_several_micro_batches_on_the_host() -> None:
    buffers = {}
    for count in (1, 2):
        setup, shape = planned(2, 2, gradient_accumulation=count)
        buffers[count] = plan_memory(setup.varied(offload=True), shape).host["communication buffers"]
    rank = RankView(setup, shape)
    assert buffers[2] - buffers[1] == 4 * rank.touched > 4 * rank.owned


def test_stage_1_reduces_through_a_bucket_beside_all_gradients() -> None:
    setup, shape = planned(2, 1, zero={"reduce_bucket_size": 1000}, **FEW)
    memory = plan_memory(setup, shape)
    assert memory.phase == "reduction"
    assert memory.device["communication buffers"] == 4 * 1000
    assert memory.device["gradients"] == 4 * shape.numel + RankView(setup, shape).step_gradients


def test_norms_are_computed_in_float64() -> None:
    setup, shape = planned(2, 2, config=llama(vocab_size=2**14), zero={"reduce_bucket_size": 1}, **FEW)
    memory = plan_memory(setup, shape)
    assert memory.phase == "norm"
    assert memory.device["optimiser's copies"] == 8 * shape.trainable["model.embed_tokens.weight"].numel


def test_states_on_disk_hold_what_methods_save_on_every_rank() -> None:
    setup, shape = planned(2, 2)
    plain = plan_memory(setup, shape).disk
    assert plain["saved state"] == 12 * shape.numel
    assert plain["saved states at most"] == (setup.recipe.checkpoint.keep + 1) * plain["saved state"]
    setup, shape = planned(2, 2, methods=[KifConfig(name="kif")])
    # Importance (smoothed and its uncertainty), and the weights of the last fusion.
    assert plan_memory(setup, shape).disk["saved state"] == pytest.approx((12 + 12) * shape.numel, rel=0.01)


def test_the_flat_weights_of_stages_1_and_2_are_padded() -> None:
    setup, shape = planned(7, 2, lora=3)
    trained = sum(each.numel for each in shape.trainable.values())
    frozen = sum(each.nbytes for each in shape.parameters if not each.trainable)
    assert trained % 14 == 2
    assert plan_memory(setup, shape).held["weights"] == frozen + 4 * (trained + 12) + shape.buffer_bytes


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2 + 4)])
def test_the_optimiser_copies_the_flat_gradient_and_converts_it_to_float32(dtype: str, size: int) -> None:
    setup, shape = planned(2, 2, zero={"reduce_bucket_size": 1000}, dtype=dtype, **FEW)
    memory = plan_memory(setup, shape)
    assert memory.phase == "optimiser"
    matrices, _ = RankView(setup, shape).map.flat_numels
    assert memory.device["optimiser's copies"] == size * matrices

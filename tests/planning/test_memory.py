from __future__ import annotations

from dataclasses import replace

import pytest

from cl_dist.kernels.row_magnitude import fold_memory
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.planning.memory import plan_memory
from cl_dist.planning.ranks import RankView
from cl_dist.tasks.samples import SELECTION_BYTES, pack, table_bytes
from cl_dist.tasks.types import IGNORE, Encoded
from tests.planning.models import llama, planned

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
    # With others to agree with, a rank has a weight of four bytes for each row.
    assert held[2, "cpu"]["MIGU's masks"] == held[2, "cuda"]["MIGU's masks"] == (1 + 8 + 4 + 4) * sum(rows)
    waiting = held[2, "cuda"]["MIGU's magnitudes"] - held[2, "cpu"]["MIGU's magnitudes"]
    assert waiting == fold_memory(2 * 32, rows) >= 4 * 2 * sum(rows)

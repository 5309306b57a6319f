"""The arithmetic of a step is what PyTorch counts, and its time follows from the device's figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cl_dist.engine.engine import loss_sum
from cl_dist.errors import BadInput
from cl_dist.methods.cost import Collective, Cost
from cl_dist.planning.devices import EFFICIENCY, NAMES, find_device
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.step_time import Arithmetic, StepTime, collective_seconds, predict_step, with_length
from cl_dist.planning.trace import Undecided
from cl_dist.planning.wire import Wire, plan_wire
from tests.planning.conftest import LORA, Planned

LENGTH = 48


def counted(setup: Setup, shape: ModelShape) -> tuple[float, float]:
    """FLOP of forward and backward of a micro-batch with targets everywhere, as PyTorch counts them."""
    ids = torch.zeros(setup.recipe.train.micro_batch_size, LENGTH, dtype=torch.long, device="meta")
    shape.model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as forward:
        logits = shape.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    with FlopCounterMode(display=False) as backward:
        loss_sum(logits, ids).backward()
    for parameter in shape.model.parameters():
        parameter.grad = None
    return forward.get_total_flops(), backward.get_total_flops()


def everywhere(setup: Setup) -> Setup:
    """Samples of LENGTH tokens, with a target at each."""
    return replace(setup, length=LENGTH, answer=LENGTH)


def test_full_training_has_the_flop_that_pytorch_counts(planned: Planned) -> None:
    setup, shape = planned()
    forward, backward = counted(setup, shape)
    arithmetic = Arithmetic(shape)
    assert arithmetic.forward_flop(everywhere(setup)) == forward
    assert arithmetic.backward_flop(everywhere(setup), Cost()) == backward


def test_adapters_have_the_flop_that_pytorch_counts(planned: Planned) -> None:
    """But for the inputs of the first layer, whose gradients nobody needs."""
    setup, shape = planned(LORA)
    forward, backward = counted(setup, shape)
    arithmetic = Arithmetic(shape)
    assert arithmetic.forward_flop(everywhere(setup)) == forward
    first = sum(
        each.numel for each in arithmetic.products if ".layers.0.self_attn" in each.name and "o_proj" not in each.name
    )
    unneeded = 2.0 * first * setup.recipe.train.micro_batch_size * LENGTH
    assert backward < arithmetic.backward_flop(everywhere(setup), Cost()) <= backward + unneeded


def test_rows_that_are_skipped_are_not_computed(planned: Planned) -> None:
    setup, shape = planned()
    arithmetic = Arithmetic(shape)
    name = "model.layers.0.mlp.up_proj.weight"
    whole, less = (arithmetic.backward_flop(everywhere(setup), Cost(skipped=part)) for part in ({}, {name: 0.75}))
    tokens = setup.recipe.train.micro_batch_size * LENGTH
    assert whole - less == 0.75 * 2 * shape.trainable[name].numel * tokens


def test_masks_that_come_in_time_save_arithmetic(planned: Planned) -> None:
    backward = {}
    for accumulation in (1, 2):
        changes = (
            "method.name=migu",
            f"train.gradient_accumulation={accumulation}",
            f"train.micro_batch_size={8 // accumulation}",
        )
        setup, shape = planned(*changes)
        wire = Wire((), (), ())
        time = predict_step(fast(setup), find_device("cpu"), wire, RankView(setup, shape), Arithmetic(shape))
        backward[accumulation] = time.backward
    assert backward[1] < 0.85 * backward[2]


def fast(setup: Setup) -> Setup:
    """Long enough that arithmetic, and not the reading of weights, takes the time."""
    return replace(setup, device="cpu", length=64, answer=64)


def test_a_step_is_the_sum_of_its_parts(planned: Planned) -> None:
    setup, shape = planned("zero.stage=3", nodes=2, ranks=8)
    time = predict_step(setup, find_device("h100"), plan_wire(setup, shape), RankView(setup, shape), Arithmetic(shape))
    parts = (
        time.forward,
        time.backward,
        time.recomputed,
        time.methods,
        time.optimizer,
        time.communication,
        time.transfers,
    )
    assert time.seconds == pytest.approx(sum(parts))
    assert time.tokens == 8 * 64 * 16
    assert time.recomputed == time.transfers == 0.0
    assert time.hidden > 0  # DeepSpeed overlaps at stage 3


def test_recomputing_and_offload_cost_time(planned: Planned) -> None:
    def step(*changes: str) -> StepTime:
        setup, shape = planned(*changes)
        return predict_step(setup, find_device("a100-80"), Wire((), (), ()), RankView(setup, shape), Arithmetic(shape))

    plain, offloaded, recomputed = step(), step("zero.offload=true"), step("train.activation_checkpointing=true")
    assert recomputed.recomputed == recomputed.forward == plain.forward
    assert offloaded.transfers > 0
    assert offloaded.optimizer > plain.optimizer


def test_a_ring_is_as_fast_as_its_slowest_link(planned: Planned) -> None:
    device, each = find_device("a10g"), EFFICIENCY
    collective = Collective("all_gather", 8 * 10**9, "weights", calls=3)
    inside, across = (collective_seconds(collective, planned(nodes=n, ranks=8)[0], device) for n in (1, 2))
    assert inside == pytest.approx(8e9 * 7 / 8 / (device.link * each.link) + 3 * (each.latency + 7 * each.hop))
    assert across == pytest.approx(8e9 * 15 / 16 / (device.network * each.link) + 3 * (each.latency + 15 * each.hop))
    assert collective_seconds(collective, planned(ranks=1)[0], device) == 0.0


def test_an_all_reduce_sends_twice_as_much_over_a_tree(planned: Planned) -> None:
    device, each = find_device("h100"), EFFICIENCY
    seconds = collective_seconds(Collective("all_reduce", 8 * 10**9, "gradients"), planned(ranks=8)[0], device)
    assert seconds == pytest.approx(2 * 8e9 * 7 / 8 / (device.link * each.link) + each.latency + 6 * each.hop)


def test_lengths_stay_within_the_recipe(planned: Planned) -> None:
    setup, shape = planned()
    assert (with_length(setup, shape, 1000, 1000).length, with_length(setup, shape, 1000, 1000).answer) == (64, 63)
    assert (with_length(setup, shape, 20, 1).length, with_length(setup, shape, 20, 1).answer) == (20, 8)


@pytest.mark.parametrize("name", NAMES)
def test_devices_are_consistent(name: str) -> None:
    device = find_device(name)
    assert device.name == name
    assert device.memory <= device.host_memory
    assert device.bandwidth >= device.link >= device.pcie / 4
    peaks = [peak for peak in (device.bfloat16, device.tf32, device.float32) if peak is not None]
    assert peaks == sorted(peaks, reverse=device.kind == "cuda")
    assert device.source
    assert device.node


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(BadInput, match="NVIDIA V100 SXM2 32 GB has no bfloat16"):
        find_device("v100").peak("bfloat16")
    assert find_device("v100").peak("float32", tf32=True) == 15.7e12
    assert find_device("h100").peak("float32", tf32=True) == 494.7e12


def test_names_of_devices_may_be_short_and_in_capitals() -> None:
    assert find_device("a100").name == "a100-80"
    assert find_device("H100").name == "h100"
    assert find_device("CPU").kind == "cpu"


def test_a_plain_text_is_predicted_everywhere(planned: Planned) -> None:
    setup, shape = planned("train.micro_batch_size=1")
    assert with_length(setup, shape, 64, 64).answer == 63
    assert with_length(setup, shape, 64, 8).answer == 8


def test_offloaded_weights_come_over_pcie(planned: Planned) -> None:
    raw = "zero.deepspeed={zero_optimization: {offload_param: {device: cpu}}}"
    device = find_device("h100")
    for ranks in (1, 4):
        (there, shape), (here, _) = planned("zero.stage=3", raw, ranks=ranks), planned("zero.stage=3", ranks=ranks)
        wire = plan_wire(there, shape)
        moved, kept = (
            predict_step(setup, device, wire, RankView(setup, shape), Arithmetic(shape)).transfers
            for setup in (there, here)
        )
        assert kept == 0
        bytes_moved = 2 * shape.nbytes if ranks == 1 else wire.step[0].bytes / ranks
        assert moved == pytest.approx(bytes_moved / (device.pcie * EFFICIENCY.pcie))


def test_a_node_with_one_device_cannot_fill_its_network(planned: Planned) -> None:
    collective, device = Collective("all_gather", 10**12, "weights"), find_device("h100")
    one, eight = (collective_seconds(collective, planned(nodes=16 // n, ranks=n)[0], device) for n in (1, 8))
    assert one / eight == pytest.approx(device.network / device.pcie, rel=0.01)


def test_an_encoder_decoder_has_the_flop_that_pytorch_counts(planned: Planned) -> None:
    """Keys and values of cross-attention are made of the input, not of the answer."""
    setup, shape = planned("model.name_or_path=builtin:t5-tiny")
    setup = replace(setup, length=LENGTH, answer=5)
    size = setup.recipe.train.micro_batch_size
    source, answer = (torch.zeros(size, length, dtype=torch.long, device="meta") for length in (LENGTH, 5))
    with Undecided(), FlopCounterMode(display=False) as forward:
        shape.model(input_ids=source, decoder_input_ids=answer)
    assert Arithmetic(shape).forward_flop(setup) == forward.get_total_flops()

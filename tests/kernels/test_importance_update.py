"""Importance and its smoothing, against the formulas in double precision."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.kernels import importance_update_, reference

MODULE = sys.modules["cl_dist.kernels.importance_update"]
ORDERS = ["first", "second", "mixed"]
NAN, INF = float("nan"), float("inf")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def shard(numel: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = (FP32,) * 4) -> States:
    torch.manual_seed(numel)
    param, grad, smoothed, uncertainty = (torch.randn(numel).to(device, dtype) for dtype in dtypes)
    return param, grad, smoothed.abs(), uncertainty.abs()


def check(tensors: States, order: str = "mixed") -> None:
    """Compare with double precision. Each state is made by about eight operations, each off by at most half a unit of
    the largest number in it; storing it in a narrower dtype rounds once more (Triton's interpreter cuts off)."""
    exact = [tensor.double() for tensor in tensors]
    product = (exact[0] * exact[1]).abs()
    size = {"first": product, "second": product**2, "mixed": product + product**2 / 2}[order] + exact[2] + exact[3]
    reference.importance_update_(*exact, order=order)
    importance_update_(*tensors, order=order)
    for new, right in zip(tensors[2:], exact[2:], strict=True):
        bound = 8 * 2**-24 * size + (torch.finfo(new.dtype).eps * right if new.dtype != FP32 else 0)
        assert ((new.double() - right).abs() <= bound).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("numel", [0, 1, 7, 2048, 5003])
def test_every_order_and_size(device: torch.device, order: str, numel: int) -> None:
    check(shard(numel, device), order)


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, FP32, FP32), (FP16, FP16, FP32, FP32), (BF16,) * 4, (FP32, BF16, FP32, FP32)]
)
def test_other_dtypes(device: torch.device, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CONVERTED", 1000)  # several pieces
    check(shard(2501, device, dtypes))


def test_shards_with_strides(device: torch.device) -> None:
    wide = shard(6002, device)
    check(tuple(tensor[::2] for tensor in wide))
    check(tuple(tensor[1::2] for tensor in wide))


def exact_shard(numel: int, seed: int) -> States:
    """Small numbers for which no operation rounds with both betas at a half."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 4, (numel,), generator=generator).float() for _ in range(4))


@settings(max_examples=100)
@given(numel=st.integers(0, 200), block=st.integers(1, 40))
def test_exact_for_any_cuts(numel: int, block: int) -> None:
    """The compiled loop's block size is a constant: the same function runs uncompiled here, with small ones."""
    state, oracle = exact_shard(numel, numel), exact_shard(numel, numel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CPU_BLOCK", block)
        patch.setattr(MODULE, "_update_block", MODULE._update_block.py_func)
        MODULE._update.function(*(tensor.numpy() for tensor in state), 1, 0.5, 0.5, 0.5, 0.5)
    reference.importance_update_(*oracle, beta1=0.5, beta2=0.5, order="first")
    assert all(torch.equal(mine, right) for mine, right in zip(state, oracle, strict=True))


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 500, 1001])
def test_exact_in_blocks(device: torch.device, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "GPU_BLOCK", 64)
    state, oracle = ([tensor.to(device) for tensor in exact_shard(numel, numel)] for _ in range(2))
    for tensors, operation in ((state, importance_update_), (oracle, reference.importance_update_)):
        operation(*tensors, beta1=0.5, beta2=0.5, order="first")
    assert all(torch.equal(mine, right) for mine, right in zip(state, oracle, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_nan_and_inf_as_the_formula_has_them(device: torch.device, value: float, order: str) -> None:
    param, grad, smoothed, uncertainty = shard(40, device)
    param[3], grad[3] = value, 2e15
    smoothed[7], uncertainty[9] = value, value
    oracle = (param, grad, smoothed.clone(), uncertainty.clone())
    importance_update_(param, grad, smoothed, uncertainty, order=order)
    reference.importance_update_(*oracle, order=order)
    for mine, right in zip((smoothed, uncertainty), oracle[2:], strict=True):
        assert torch.equal(mine.isnan(), right.isnan())
        assert torch.equal(mine.isinf(), right.isinf())
        usual = right.isfinite()
        torch.testing.assert_close(mine[usual], right[usual], rtol=1e-5, atol=1e-5)


def test_betas_decide_how_much_of_the_old_stays(device: torch.device) -> None:
    for beta1, beta2 in ((0.0, 0.25), (1.0, 0.0), (0.75, 1.0)):
        state, oracle = ([tensor.to(device) for tensor in exact_shard(50, 1)] for _ in range(2))
        importance_update_(*state, beta1=beta1, beta2=beta2, order="second")
        reference.importance_update_(*oracle, beta1=beta1, beta2=beta2, order="second")
        assert all(torch.equal(mine, right) for mine, right in zip(state, oracle, strict=True))


def test_the_number_of_threads_changes_nothing() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            state = shard(300_001, torch.device("cpu"))
            importance_update_(*state)
            results.append(state)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_callers_in_several_threads() -> None:
    expected = shard(100_000, torch.device("cpu"))
    importance_update_(*expected)
    states = [shard(100_000, torch.device("cpu")) for _ in range(4)]
    callers = [threading.Thread(target=importance_update_, args=state) for state in states]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(mine, right) for state in states for mine, right in zip(state, expected, strict=True))


FORKED = """
import os, numpy, torch
from cl_dist.kernels import importance_update_
torch.set_num_threads(2)
state = [torch.ones(100_000) for _ in range(4)]
importance_update_(*state)
child = os.fork()
importance_update_(*state)
if child == 0:
    os._exit(0 if numpy.isfinite(state[2].numpy()).all() else 3)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_used_threads_neither_hangs_nor_dies() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(7)}, "of one length"),
        ({"param": torch.zeros(2, 4)}, "must be flat"),
        ({"grad": torch.zeros(8, dtype=torch.int32)}, "must be floating"),
        ({"grad": torch.zeros(8, device="meta")}, "must be on cpu"),
        ({"order": "third"}, "order must be one of first, second, mixed"),
        ({"beta1": 1.5}, "between 0 and 1"),
        ({"beta2": NAN}, "between 0 and 1"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, object], message: str) -> None:
    names = ("param", "grad", "smoothed", "uncertainty")
    with pytest.raises(ValueError, match=message):
        importance_update_(**({name: torch.zeros(8) for name in names} | change))

"""Importance, its smoothing and the unit sums, against the formulas in double precision."""

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


def check(tensors: States, order: str = "mixed", start: int = 0, unit_length: int = 0) -> None:
    """Compare with double precision. Each state is made by about eight operations, each off by at most half a unit of
    the largest number in it; storing it in a narrower dtype rounds once more (Triton's interpreter cuts off)."""
    exact = [tensor.double() for tensor in tensors]
    product = (exact[0] * exact[1]).abs()
    size = {"first": product, "second": product**2, "mixed": product + product**2 / 2}[order] + exact[2] + exact[3]
    reference.importance_update_(*exact, order=order)
    units = (start + len(product)) // unit_length + 1 if unit_length else 0
    sums = torch.ones(units, dtype=torch.float64, device=product.device) if unit_length else None
    importance_update_(*tensors, order=order, start=start, unit_length=unit_length or None, unit_sums=sums)
    for new, right in zip(tensors[2:], exact[2:], strict=True):
        bound = 8 * 2**-24 * size + (torch.finfo(new.dtype).eps * right if new.dtype != FP32 else 0)
        assert ((new.double() - right).abs() <= bound).all()
    if sums is None:
        return
    # Products of the states as they were in float32, at most that many added in float32.
    rounded = max(torch.finfo(new.dtype).eps for new in tensors[2:]) if tensors[2].dtype != FP32 else 0
    expected = sums.new_ones(units)
    unit = torch.arange(start, start + len(product), device=product.device) // unit_length
    expected.index_add_(0, unit, tensors[2].double() * tensors[3].double())
    bound = (min(unit_length, MODULE.GPU_BLOCK) + 2) * 2**-24 + 2 * rounded
    torch.testing.assert_close(sums, expected, rtol=bound, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("numel", [0, 1, 7, 2048, 5003])
def test_every_order_and_size(device: torch.device, order: str, numel: int) -> None:
    check(shard(numel, device), order)
    check(shard(numel, device), order, start=5, unit_length=300)


@pytest.mark.parametrize("unit_length", [1, 3, 8, 256, 257, 2000, 2048, 2049, 10**6])
@pytest.mark.parametrize("start", [0, 1, 2047, 10**6 - 1])
def test_units_of_every_length(device: torch.device, unit_length: int, start: int) -> None:
    check(shard(9001, device), start=start, unit_length=unit_length)


@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16, FP32, FP32), (FP16, FP16, FP32, FP32), (BF16,) * 4, (FP32, BF16, FP32, FP32)]
)
def test_other_dtypes(device: torch.device, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CONVERTED", 1000)  # several pieces
    check(shard(2501, device, dtypes))
    check(shard(2501, device, dtypes), start=11, unit_length=300)


def test_shards_with_strides(device: torch.device) -> None:
    wide = shard(6002, device)
    check(tuple(tensor[::2] for tensor in wide), start=3, unit_length=300)
    check(tuple(tensor[1::2] for tensor in wide), start=3, unit_length=7)


def exact_shard(numel: int, seed: int) -> States:
    """Small numbers for which no operation rounds with both betas at a half."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 4, (numel,), generator=generator).float() for _ in range(4))


@settings(max_examples=100)
@given(
    unit_length=st.integers(1, 60),
    start=st.integers(0, 200),
    numel=st.integers(0, 200),
    block=st.integers(1, 40),
    piece=st.integers(1, 20),
)
def test_exact_unit_sums_for_any_cuts(unit_length: int, start: int, numel: int, block: int, piece: int) -> None:
    """The compiled loop's block sizes are constants: the same function runs uncompiled here, with small ones."""
    state, oracle = exact_shard(numel, numel), exact_shard(numel, numel)
    sums, expected = (torch.ones((start + numel) // unit_length + 1, dtype=torch.float64) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "CPU_BLOCK", block)
        patch.setattr(MODULE, "CPU_PIECE", piece)
        for name in ("_update_block", "_sum_block", "_sum_unit"):
            patch.setattr(MODULE, name, getattr(MODULE, name).py_func)
        arrays = [tensor.numpy() for tensor in state]
        MODULE._update.function(*arrays, 1, 0.5, 0.5, 0.5, 0.5, start, unit_length, sums.numpy())
    units = {"unit_length": unit_length, "unit_sums": expected}
    reference.importance_update_(*oracle, beta1=0.5, beta2=0.5, order="first", start=start, **units)
    assert torch.equal(sums, expected)
    assert all(torch.equal(mine, right) for mine, right in zip(state, oracle, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_exact_unit_sums_in_blocks(device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "GPU_BLOCK", 64)
    monkeypatch.setattr(MODULE, "SHORT_UNIT", 8)
    monkeypatch.setattr(MODULE, "SHORT_TILE", 32)
    monkeypatch.setattr(MODULE, "FOLDED", 4)
    unit_length, start, numel = [1, 3, 8, 9, 31, 63, 64, 65, 130, 257, 1000, 5000][seed], 37 * seed, 500 + 13 * seed
    state, oracle = ([tensor.to(device) for tensor in exact_shard(numel, seed)] for _ in range(2))
    sums, expected = (torch.ones(2000, dtype=torch.float64, device=device) for _ in range(2))
    for tensors, total, operation in (
        (state, sums, importance_update_),
        (oracle, expected, reference.importance_update_),
    ):
        units = {"start": start, "unit_length": unit_length, "unit_sums": total}
        operation(*tensors, beta1=0.5, beta2=0.5, order="first", **units)
    assert torch.equal(sums, expected)
    assert all(torch.equal(mine, right) for mine, right in zip(state, oracle, strict=True))


def test_positions_beyond_32_bits(device: torch.device) -> None:
    length, start = 2**33 + 1, 3 * (2**33 + 1) - 100
    state = [tensor.to(device) for tensor in exact_shard(300, 0)]
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    importance_update_(*state, beta1=0.5, beta2=0.5, order="first", start=start, unit_length=length, unit_sums=sums)
    score = state[2].double() * state[3].double()
    assert sums.tolist() == [0, 0, score[:100].sum().item(), score[100:].sum().item()]


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


def test_nan_spoils_the_sum_of_its_own_unit_only(device: torch.device) -> None:
    param, grad, smoothed, uncertainty = shard(3000, device)
    param[1400] = NAN
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    importance_update_(param, grad, smoothed, uncertainty, unit_length=1000, unit_sums=sums)
    assert sums.isnan().tolist() == [False, True, False]


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
            sums = torch.zeros(4, dtype=torch.float64)
            importance_update_(*state, start=7, unit_length=100_003, unit_sums=sums)
            results.append((*state, sums))
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
        ({"unit_length": 4}, "together or not at all"),
        ({"unit_sums": torch.zeros(2)}, "together or not at all"),
        ({"unit_length": 0, "unit_sums": torch.zeros(2)}, "at least 1"),
        ({"start": -1}, "at least 0"),
        ({"unit_length": 4, "unit_sums": torch.zeros(2)}, "float64"),
        ({"unit_length": 4, "unit_sums": torch.zeros(2).double(), "start": 1}, "longer than 2 units of 4"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, object], message: str) -> None:
    names = ("param", "grad", "smoothed", "uncertainty")
    with pytest.raises(ValueError, match=message):
        importance_update_(**({name: torch.zeros(8) for name in names} | change))

"""Weight gradients of the kept rows, against the whole product in double precision."""

import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.kernels import masked_weight_grad, reference, weight_grad_way, weight_grad_ways

MODULE = sys.modules["cl_dist.kernels.masked_weight_grad"]
GPU = sys.modules["cl_dist.kernels.weight_grad_on_gpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda y: y,
    "transposed": lambda y: y.t().contiguous().t(),
    "every second column": lambda y: y.repeat_interleave(2, dim=1)[:, ::2],
    "part of wider rows": lambda y: torch.cat([y, y, y], dim=1)[:, y.shape[1] : 2 * y.shape[1]],
    "one token for all": lambda y: y[:1].expand(y.shape),
    "in a batch": lambda y: y.reshape(5, -1, y.shape[1]),
}


def kept(rows: int, share: float = 0.3, seed: int = 0) -> torch.Tensor:
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(rows * share))].sort().values


def check(x: torch.Tensor, dy: torch.Tensor, rows: torch.Tensor, into: bool = False) -> None:
    """Compare weight and bias with sums in double precision.

    A sum of T products in float32 is off by at most T half units of the sum of the absolute products; storing it rounds
    once more by a unit (Triton's interpreter cuts off), and adding it to a gradient twice. Where a row is not kept all
    of this is zero, and so must be the difference.
    """
    unit = torch.finfo(x.dtype).eps
    out_features, in_features = dy.shape[-1], x.shape[-1]
    grads = (
        [torch.randn(shape).to(x) for shape in ((out_features, in_features), (out_features,))] if into else [None] * 2
    )
    before = [torch.zeros(()) if grad is None else grad.clone().double() for grad in grads]
    results = masked_weight_grad(x, dy, rows, *grads, bias=True)
    exact = reference.masked_weight_grad(x.double(), dy.double(), rows, bias=True)
    sizes = reference.masked_weight_grad(x.abs().double(), dy.abs().double(), rows, bias=True)
    tokens = x.numel() // max(1, in_features)
    for result, grad, old, new, size in zip(results, grads, before, exact, sizes, strict=True):
        assert result.dtype == x.dtype
        assert grad is None or result is grad
        bound = tokens * 2**-24 * size + unit * (new.abs() + (new + old).abs()) * (new != 0)
        assert ((result.double() - (old.to(new) + new)).abs() <= bound).all()


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_layout(device: torch.device, dtype: torch.dtype, layout: str, into: bool) -> None:
    torch.manual_seed(0)
    x, dy = (
        LAYOUTS[layout](torch.randn(35, 70).to(device, dtype)),
        LAYOUTS[layout](torch.randn(35, 19).to(device, dtype)),
    )
    check(x, dy, kept(19).to(device), into)


@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"),
    [(1, 1, 1), (1, 9, 130), (0, 5, 70), (3, 1, 65), (17, 8, 600), (40, 90, 8), (70, 200, 33), (5, 33, 520)],
)
def test_odd_sizes(device: torch.device, tokens: int, out_features: int, in_features: int) -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(tokens, in_features, device=device), torch.randn(tokens, out_features, device=device)
    for share in (0.0, 0.3, 0.9, 1.0):
        for into in (False, True):
            check(x, dy, kept(out_features, share).to(device), into)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 80),
    share=st.floats(0, 1),
    block=st.integers(1, 9),
    into=st.booleans(),
)
def test_any_size_on_the_cpu(
    tokens: int, out_features: int, in_features: int, share: float, block: int, into: bool
) -> None:
    """The products are cut into blocks of a few rows here, and large zeros come from the system."""
    generator = torch.Generator().manual_seed(tokens)
    x, dy = (torch.randn(tokens, features, generator=generator) for features in (in_features, out_features))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "BLOCK_BYTES", 0)
        patch.setattr(MODULE, "BLOCK_ROWS", block)
        patch.setattr(MODULE, "ALWAYS_LAZY_BYTES", 4096)
        check(x, dy, kept(out_features, share), into)


def test_no_input_feature(device: torch.device) -> None:
    weight, bias = masked_weight_grad(
        torch.zeros(4, 0, device=device),
        torch.ones(4, 6, device=device),
        torch.tensor([1, 5], device=device),
        bias=True,
    )
    assert weight.shape == (6, 0)
    assert bias is not None
    assert bias.tolist() == [0, 4, 0, 0, 0, 4]


def test_no_row_is_kept(device: torch.device) -> None:
    x, dy, none = torch.randn(4, 70, device=device), torch.randn(4, 6, device=device), torch.empty(0, dtype=torch.int64)
    weight, bias = masked_weight_grad(x, dy, none.to(device), bias=True)
    assert torch.equal(weight, torch.zeros(6, 70, device=device))
    assert bias is not None
    assert torch.equal(bias, torch.zeros(6, device=device))


@pytest.mark.parametrize("in_features", [3, 70, 600])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_row(device: torch.device, value: float, in_features: int) -> None:
    x, dy = torch.ones(4, in_features, device=device), torch.ones(4, 6, device=device)
    dy[1, 2] = dy[1, 3] = value
    rows = torch.tensor([0, 3, 5], device=device)
    weight, bias = masked_weight_grad(x, dy, rows, bias=True)
    assert bias is not None
    for row, expected in enumerate([4.0, 0.0, 0.0, value, 0.0, 4.0]):
        same = torch.full((in_features,), expected, device=device)
        torch.testing.assert_close(weight[row], same, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(bias[row], same[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("in_features", [3, 70])
def test_other_rows_of_a_given_gradient_are_not_touched(device: torch.device, in_features: int) -> None:
    grad, bias_grad = torch.full((6, in_features), NAN, device=device), torch.full((6,), NAN, device=device)
    rows = torch.tensor([1, 4], device=device)
    grad[rows], bias_grad[rows] = 1.0, 1.0
    x, dy = torch.ones(4, in_features, device=device), torch.ones(4, 6, device=device)
    masked_weight_grad(x, dy, rows, grad, bias_grad, bias=True)
    assert grad[:, 0].isnan().tolist() == bias_grad.isnan().tolist() == [True, False, True, True, False, True]
    assert (grad[rows] == 5).all()
    assert (bias_grad[rows] == 5).all()


@pytest.mark.parametrize("in_features", [3, 70])
def test_a_wider_gradient_and_one_with_strides(device: torch.device, in_features: int) -> None:
    x, dy = torch.ones(4, in_features, device=device).bfloat16(), torch.ones(4, 6, device=device).bfloat16()
    grad = torch.full((in_features, 6), 2.0**-12, device=device).t()
    rows = torch.tensor([1, 4], device=device)
    masked_weight_grad(x, dy, rows, grad)
    assert (grad[rows] == 4 + 2.0**-12).all()
    assert grad.sum().item() == pytest.approx(in_features * (8 + 6 * 2.0**-12), rel=1e-7)


def test_the_same_every_time(device: torch.device) -> None:
    torch.manual_seed(3)
    x, dy, rows = torch.randn(90, 70, device=device), torch.randn(90, 50, device=device), kept(50).to(device)
    first = masked_weight_grad(x, dy, rows)[0]
    assert all(torch.equal(masked_weight_grad(x, dy, rows)[0], first) for _ in range(3))


def test_rows_at_which_offsets_pass_32_bits(triton_path: torch.device) -> None:
    if triton_path.type == "cuda":
        pytest.skip("needs 18 GB; the interpreter needs none of it")
    stride = 2**30  # times 3 does not fit, although stride and index do
    # Pages that nobody writes to take no memory, and none is set aside for them.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffers = [mmap.mmap(-1, 2 * (3 * stride + 8), flags=private) for _ in range(3)]
    x, dy, grad = (torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((4, 8), (stride, 1)) for pages in buffers)
    x[:, :], dy[:, :] = torch.arange(8.0), torch.arange(4.0).unsqueeze(1)
    masked_weight_grad(x, dy[:, :4], torch.tensor([0, 3]), grad)
    assert grad.tolist() == [[6.0 * i for i in range(8)], [0.0] * 8, [0.0] * 8, [6.0 * i for i in range(8)]]


def all_ways(x: torch.Tensor, dy: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute with every way into memory that holds NaN, compare with float64 (see `check`), and repeat."""
    exact = reference.masked_weight_grad(x.double(), dy.double(), rows)[0]
    size = reference.masked_weight_grad(x.abs().double(), dy.abs().double(), rows)[0]
    bound = len(x) * 2**-24 * size + torch.finfo(x.dtype).eps * exact.abs()
    results = {}
    for name, way in weight_grad_ways(x).items():
        results[name] = way(x, dy, rows)
        assert results[name].dtype == x.dtype
        assert ((results[name].double() - exact).abs() <= bound).all(), name
        assert torch.equal(way(x, dy, rows), results[name]), name
    return results


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"), [(1, 1, 8), (1, 9, 136), (70, 300, 40), (130, 33, 264)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_way_on_a_gpu(
    triton_path: torch.device,
    dirty_memory: None,
    dtype: torch.dtype,
    tokens: int,
    out_features: int,
    in_features: int,
    share: float,
) -> None:
    torch.manual_seed(4)
    x = torch.randn(tokens, in_features, device=triton_path).to(dtype)
    dy = torch.randn(tokens, out_features, device=triton_path).to(dtype)
    results = all_ways(x, dy, kept(out_features, share).to(triton_path))
    assert results.keys() == {"gathered", "tiles", "vendor", "persistent"}


@pytest.mark.parametrize("rows", [[0], [6], [0, 1, 2], [4, 5, 6], [0, 6]])
def test_every_way_with_rows_at_the_ends(triton_path: torch.device, dirty_memory: None, rows: list[int]) -> None:
    x, dy = (torch.randn(9, features, device=triton_path).bfloat16() for features in (16, 7))
    all_ways(x, dy, torch.tensor(rows, device=triton_path))


def test_a_persistent_program_with_several_tiles(
    triton_path: torch.device, dirty_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPU, "multiprocessors", lambda _: 2)
    x, dy = (torch.randn(70, features, device=triton_path).bfloat16() for features in (264, 300))
    few, many = (all_ways(x, dy, kept(300, share).to(triton_path))["persistent"] for share in (0.3, 0.9))
    assert few.shape == many.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float(),
        lambda x: x[:, 1:],
        lambda x: x[:, :12],
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:0],
    ],
    ids=["float32", "begins unaligned", "aligned", "transposed", "one token for all", "no token"],
)
def test_what_descriptors_cannot_read_goes_another_way(
    triton_path: torch.device, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = change(torch.randn(64, 24, device=triton_path).bfloat16())
    dy = torch.randn(len(x), 10, device=triton_path).to(x.dtype)
    ways = all_ways(x, dy, kept(10).to(triton_path))
    assert ("persistent" in ways) == (x.shape == (64, 12))
    if "persistent" not in ways:
        with pytest.raises(ValueError, match="tensor descriptors cannot read"):
            GPU.WAYS["persistent"](x, dy, kept(10).to(triton_path))


@pytest.mark.parametrize(
    ("tokens", "in_features", "kept_rows", "tma", "way"),
    [
        (4096, 512, 1229, True, "gathered"),
        (4096, 11008, 1229, True, "persistent"),  # 430 tiles on 132 multiprocessors: 4 rounds, 0.81 full
        (4096, 4096, 3303, True, "persistent"),  # 416 tiles: 0.79
        (4096, 4096, 1229, True, "vendor"),  # 160 tiles in two rounds: 0.61
        (4096, 4096, 3303, False, "vendor"),
        (512, 4096, 3303, False, "tiles"),
    ],
)
def test_the_rule_that_chooses_a_way(
    triton_path: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    in_features: int,
    kept_rows: int,
    tma: bool,
    way: str,
) -> None:
    monkeypatch.setattr(GPU, "has_descriptors", lambda _: tma)
    monkeypatch.setattr(GPU, "multiprocessors", lambda _: 132)
    x = torch.empty(tokens, in_features, dtype=torch.bfloat16)
    assert weight_grad_way(x, kept_rows) == way


@pytest.mark.parametrize("way", ["gathered", "tiles", "vendor", "persistent"])
def test_the_operation_goes_the_chosen_way(
    triton_path: torch.device, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(GPU, "way_for", lambda *_: way)
    x, dy = (torch.randn(5, features, device=triton_path).bfloat16() for features in (16, 7))
    rows = torch.tensor([1, 4], device=triton_path)
    assert torch.equal(masked_weight_grad(x, dy, rows)[0], GPU.WAYS[way](x, dy, rows))


def test_a_cpu_has_one_way() -> None:
    x, dy, rows = torch.randn(5, 16), torch.randn(5, 7), torch.tensor([1, 4])
    assert weight_grad_way(x, 2) == "torch"
    assert torch.equal(all_ways(x, dy, rows)["torch"], masked_weight_grad(x, dy, rows)[0])


class _Linear(torch.autograd.Function):
    """A linear layer whose weight gradient is masked, as a user would write it."""

    made = 0

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor) -> tuple[None, torch.Tensor]:
        grad, _ = masked_weight_grad(*ctx.saved_tensors, dy, kept(dy.shape[-1]))
        _Linear.made = grad.data_ptr()
        return None, grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_takes_the_gradient_over_without_a_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "ALWAYS_LAZY_BYTES", 4096)
    weight = torch.zeros(64, 96, dtype=dtype, requires_grad=True)
    x = torch.ones(2, 96, dtype=dtype)
    _Linear.apply(x, weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == _Linear.made
    first = weight.grad.clone()
    _Linear.apply(x, weight).sum().backward()
    assert torch.equal(weight.grad, 2 * first)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(("out_features", "in_features"), [(6000, 4096), (7000, 1024)])
def test_rows_that_are_dropped_take_no_memory(out_features: int, in_features: int) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    x, dy, rows = torch.randn(4, in_features), torch.randn(4, out_features), kept(out_features)
    grown = []
    for _ in range(6):  # what is loaded and allocated once, and what the allocator keeps, differ from call to call
        before = resident()
        weight, _ = masked_weight_grad(x, dy, rows)
        grown.append(resident() - before)
        size = weight.numel() * weight.element_size()
        del weight
    assert size > MODULE.LAZY_BYTES
    assert 0.25 * size < min(grown) < 0.6 * size  # 0.3 for the rows; blocks and buffers are the rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": torch.zeros(4, 6)}, "do not have the same tokens"),
        ({"input": torch.zeros(3, 8).double()}, "one floating dtype"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows must be"),
        ({"rows": torch.zeros(2, 1, dtype=torch.int64)}, "rows must be"),
        ({"weight_grad": torch.zeros(8, 6)}, "weight_grad must be"),
        ({"bias_grad": torch.zeros(6)}, "bias is False"),
        ({"bias_grad": torch.zeros(5), "bias": True}, "bias_grad must be"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "must be on cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"input": torch.zeros(3, 8), "grad_output": torch.zeros(3, 6), "rows": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=message):
        masked_weight_grad(**(arguments | change))

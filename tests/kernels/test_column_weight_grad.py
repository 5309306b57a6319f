"""Weight gradients of the kept columns, against the whole product in double precision."""

import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.kernels import column_weight_grad, column_weight_grad_way, column_weight_grad_ways, reference
from tests.kernels.test_masked_weight_grad import DTYPES, LAYOUTS, NAN, kept

MODULE = sys.modules["cl_dist.kernels.column_weight_grad"]
GPU = sys.modules["cl_dist.kernels.weight_grad_on_gpu"]


def within_rounding(result: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, columns: torch.Tensor) -> bool:
    """Compare with sums in double precision.

    A sum of T products in float32 is off by at most T half units of the sum of the absolute products; storing it rounds
    once more by a unit (Triton's interpreter cuts off).
    """
    exact = reference.column_weight_grad(x.double(), dy.double(), columns)
    size = reference.column_weight_grad(x.abs().double(), dy.abs().double(), columns)
    tokens = x.numel() // max(1, x.shape[-1])
    bound = tokens * 2**-24 * size + torch.finfo(x.dtype).eps * exact.abs()
    return result.shape == exact.shape and bool(((result.double() - exact).abs() <= bound).all())


def check(x: torch.Tensor, dy: torch.Tensor, columns: torch.Tensor) -> None:
    """The gradient and its transpose; and both again from the kept columns of the input alone."""
    chosen = x.index_select(-1, columns)
    for result in (
        column_weight_grad(x, dy, columns),
        column_weight_grad(x, dy, columns, transposed=True).t(),
        column_weight_grad(chosen, dy),
        column_weight_grad(chosen, dy, transposed=True).t(),
    ):
        assert result.dtype == x.dtype
        assert within_rounding(result, x, dy, columns)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_layout(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    x, dy = (
        LAYOUTS[layout](torch.randn(35, 19).to(device, dtype)),
        LAYOUTS[layout](torch.randn(35, 70).to(device, dtype)),
    )
    check(x, dy, kept(19).to(device))


@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"),
    [(1, 1, 1), (1, 9, 130), (0, 5, 70), (3, 1, 65), (17, 8, 600), (40, 90, 8), (70, 200, 33), (5, 33, 520)],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_odd_sizes(device: torch.device, tokens: int, in_features: int, out_features: int, share: float) -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(tokens, in_features, device=device), torch.randn(tokens, out_features, device=device)
    check(x, dy, kept(in_features, share).to(device))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 40),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 80),
    share=st.floats(0, 1),
    cost=st.integers(0, 100),
)
def test_any_size_on_the_cpu(tokens: int, out_features: int, in_features: int, share: float, cost: int) -> None:
    """Whole products, of which the kept columns are picked, and products of copied columns."""
    generator = torch.Generator().manual_seed(tokens)
    x, dy = (torch.randn(tokens, features, generator=generator) for features in (in_features, out_features))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "GATHER_COST", cost)
        check(x, dy, kept(in_features, share))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 70),
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 80),
    share=st.floats(0, 1),
    way=st.sampled_from(["gathered", "vendor"]),
)
def test_any_size_on_a_gpu(tokens: int, out_features: int, in_features: int, share: float, way: str) -> None:
    if GPU.tl is None:
        pytest.skip("Triton is not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(tokens)
    x, dy = (torch.randn(tokens, features, generator=generator).to(device) for features in (in_features, out_features))
    columns = kept(in_features, share).to(device)
    for transposed in (False, True):
        result = GPU.COLUMN_WAYS[way](x, dy, columns, transposed)
        assert within_rounding(result.t() if transposed else result, x, dy, columns)


def test_no_column_is_kept(device: torch.device) -> None:
    x, dy, none = torch.randn(4, 70, device=device), torch.randn(4, 6, device=device), torch.empty(0, dtype=torch.int64)
    assert column_weight_grad(x, dy, none.to(device)).shape == (6, 0)
    assert column_weight_grad(x, dy, none.to(device), transposed=True).shape == (0, 6)


@pytest.mark.parametrize("out_features", [3, 70, 600])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_column(device: torch.device, value: float, out_features: int) -> None:
    x, dy = torch.ones(4, 6, device=device), torch.ones(4, out_features, device=device)
    x[1, 2] = x[1, 3] = value
    weight = column_weight_grad(x, dy, torch.tensor([0, 3, 5], device=device))
    for place, expected in enumerate([4.0, value, 4.0]):
        same = torch.full((out_features,), expected, device=device)
        torch.testing.assert_close(weight[:, place], same, rtol=0, atol=0, equal_nan=True)


def test_the_same_every_time(device: torch.device) -> None:
    torch.manual_seed(3)
    x, dy, columns = torch.randn(90, 50, device=device), torch.randn(90, 70, device=device), kept(50).to(device)
    first = column_weight_grad(x, dy, columns)
    assert all(torch.equal(column_weight_grad(x, dy, columns), first) for _ in range(3))


def test_the_result_has_memory_of_its_own_in_order(device: torch.device) -> None:
    x, dy = torch.randn(9, 20, device=device), torch.randn(9, 70, device=device)
    for transposed in (False, True):
        assert column_weight_grad(x, dy, kept(20).to(device), transposed=transposed).is_contiguous()


def test_columns_at_which_offsets_pass_32_bits(triton_path: torch.device) -> None:
    if triton_path.type == "cuda":
        pytest.skip("needs 12 GB; the interpreter needs none of it")
    stride = 2**30  # times 3 does not fit, although stride and index do
    # Pages that nobody writes to take no memory, and none is set aside for them.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffers = [mmap.mmap(-1, 2 * (3 * stride + 8), flags=private) for _ in range(2)]
    # The distance is between columns of the input, which are counted by `columns`, and between tokens of the gradient.
    x = torch.frombuffer(buffers[0], dtype=torch.bfloat16).as_strided((4, 4), (1, stride))
    dy = torch.frombuffer(buffers[1], dtype=torch.bfloat16).as_strided((4, 8), (stride, 1))
    x[:, :], dy[:, :] = torch.arange(4.0), torch.arange(8.0)
    assert column_weight_grad(x, dy, torch.tensor([0, 3])).tolist() == [[0.0, 12.0 * row] for row in range(8)]


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"), [(1, 1, 8), (1, 9, 136), (70, 300, 40), (130, 33, 264)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_way_on_a_gpu(
    triton_path: torch.device,
    dirty_memory: None,
    dtype: torch.dtype,
    tokens: int,
    in_features: int,
    out_features: int,
    share: float,
) -> None:
    """Into memory that holds NaN, and again."""
    torch.manual_seed(4)
    x = torch.randn(tokens, in_features, device=triton_path).to(dtype)
    dy = torch.randn(tokens, out_features, device=triton_path).to(dtype)
    columns = kept(in_features, share).to(triton_path)
    ways = column_weight_grad_ways(x)
    assert ways.keys() == {"gathered", "vendor"}
    for name, way in ways.items():
        for transposed in (False, True):
            result = way(x, dy, columns, transposed)
            assert within_rounding(result.t() if transposed else result, x, dy, columns), name
            assert torch.equal(way(x, dy, columns, transposed), result), name


@pytest.mark.parametrize("columns", [[0], [6], [0, 1, 2], [4, 5, 6], [0, 6]])
def test_every_way_with_columns_at_the_ends(
    triton_path: torch.device,
    dirty_memory: None,
    columns: list[int],
) -> None:
    x, dy = (torch.randn(9, features, device=triton_path).bfloat16() for features in (7, 16))
    chosen = torch.tensor(columns, device=triton_path)
    for name, way in column_weight_grad_ways(x).items():
        assert within_rounding(way(x, dy, chosen, False), x, dy, chosen), name


@pytest.mark.parametrize(("out_features", "way"), [(8, "gathered"), (512, "gathered"), (513, "vendor")])
def test_the_operation_goes_the_way_that_the_rule_names(
    triton_path: torch.device, monkeypatch: pytest.MonkeyPatch, out_features: int, way: str
) -> None:
    taken: list[str] = []

    def noted(name: str) -> Callable[..., torch.Tensor]:
        def run(*arguments: torch.Tensor) -> torch.Tensor:
            taken.append(name)
            return original[name](*arguments)

        return run

    original = dict(GPU.COLUMN_WAYS)
    monkeypatch.setattr(GPU, "COLUMN_WAYS", {name: noted(name) for name in original})
    x, dy = (torch.randn(5, features, device=triton_path).bfloat16() for features in (7, out_features))
    columns = torch.tensor([1, 4], device=triton_path)
    result = column_weight_grad(x, dy, columns)
    assert taken == [way] == [column_weight_grad_way(x, out_features)]
    assert torch.equal(result, original[way](x, dy, columns, False))


def test_a_cpu_has_one_way() -> None:
    x, dy, columns = torch.randn(5, 16), torch.randn(5, 7), torch.tensor([1, 4])
    assert column_weight_grad_way(x, 7) == "torch"
    [way] = column_weight_grad_ways(x).values()
    assert torch.equal(way(x, dy, columns, False), column_weight_grad(x, dy, columns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_output": torch.zeros(4, 6)}, "do not have the same tokens"),
        ({"input": torch.zeros(3, 8).double()}, "one floating dtype"),
        ({"columns": torch.zeros(2, dtype=torch.int32)}, "columns must be"),
        ({"columns": torch.zeros(2, 1, dtype=torch.int64)}, "columns must be"),
        ({"columns": torch.arange(9)}, "9 columns were given, but the input has 8"),
        ({"columns": torch.zeros(2, dtype=torch.int64, device="meta")}, "must be on cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"input": torch.zeros(3, 8), "grad_output": torch.zeros(3, 6), "columns": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=message):
        column_weight_grad(**(arguments | change))

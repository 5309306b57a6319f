"""bfloat16 products on CPUs without instructions for them.

The tests look at the operators that torch really runs, innermost ones only, and at the dtype and strides of their
operands. They install the kernels for CPUs without the instructions, whatever this CPU has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch.nn.functional import linear
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from cl_dist.config.schema import LoraConfig
from cl_dist.models import bfloat16
from cl_dist.models.bfloat16 import FloatProducts, in_float32
from cl_dist.models.lora import add_lora
from cl_dist.models.row_gradients import ChosenRows, row_skipping_conv1d, row_skipping_linear
from tests.models.conftest import Loader

TOKENS, INPUTS, OUTPUTS = 7, 16, 24
FLOAT, BFLOAT16 = "Tensor(float)", "Tensor(c10::BFloat16)"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_")


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Without what a test before has installed, if this CPU lacks the instructions."""
    before = bfloat16._installed
    if before is not None:
        before.remove()
        bfloat16._installed = None
    yield
    if before is not None:
        bfloat16.mend_products()


@pytest.fixture
def mended() -> Iterator[None]:
    """The kernels of a CPU without the instructions."""
    installed = FloatProducts()
    yield
    installed.remove()


def drawn(*shape: int) -> torch.Tensor:
    """A leaf of the graph."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().requires_grad_()


def innermost_products(run: Callable[[], object], trace: Path) -> list[list[str]]:
    """The dtypes of the two factors of every product that no product inside it computes; recorded in the file `trace`.

    The observer knows which operator called which. The profiler's tree only compares their times, which nests
    operators wrongly where the clock is coarse.
    """
    observer = ExecutionTraceObserver()
    observer.register_callback(str(trace))
    with profile(activities=[ProfilerActivity.CPU], execution_trace_observer=observer):
        run()
    operators = {each["id"]: each for each in json.loads(trace.read_text())["nodes"]}
    products = {number for number, each in operators.items() if each["name"] in PRODUCTS}
    outer = {caller for number in products for caller in _callers(operators, number)}
    return [_factors(operators[number]) for number in sorted(products - outer)]


def _callers(operators: dict[int, Any], number: int) -> Iterator[int]:
    while (number := operators[number]["ctrl_deps"]) in operators and operators[number]["ctrl_deps"] != number:
        yield number


def _factors(operator: dict[str, Any]) -> list[str]:
    tensors = [each for each in operator["inputs"]["types"] if each.startswith("Tensor")]
    first = 1 if "add" in operator["name"] else 0
    return tensors[first : first + 2]


def backward(output: torch.Tensor) -> None:
    """From a gradient that is contiguous, as layers get it."""
    output.backward(torch.ones_like(output).contiguous())


def plain() -> None:
    """nn.Linear with a bias, batched input."""
    backward(linear(drawn(2, TOKENS, INPUTS), drawn(OUTPUTS, INPUTS), drawn(OUTPUTS)))


def stage_3() -> None:
    """The linear layer that DeepSpeed puts in its place under stage 3."""
    backward(zero3_linear_wrap(drawn(2, TOKENS, INPUTS), drawn(OUTPUTS, INPUTS), drawn(OUTPUTS)))


def skipping() -> None:
    """The layer that skips rows."""
    chosen = ChosenRows("layer", mask_bias=True, rows=torch.tensor([0, 3, 4, 8, 9, 11]))
    backward(row_skipping_linear(drawn(2, TOKENS, INPUTS), drawn(OUTPUTS, INPUTS), None, chosen))


def skipping_transposed() -> None:
    """GPT-2's layer, whose output is a product of two row-major matrices."""
    chosen = ChosenRows("layer", mask_bias=True, rows=torch.tensor([0, 3, 4, 8, 9, 11]))
    backward(row_skipping_conv1d(drawn(2, TOKENS, INPUTS), drawn(INPUTS, OUTPUTS), drawn(OUTPUTS), chosen))


def transposed() -> None:
    """The same with plain gradients."""
    layer = Conv1D(OUTPUTS, INPUTS).bfloat16()
    backward(layer(drawn(2, TOKENS, INPUTS)))


def into() -> None:
    """Into a given tensor, as the experts' backward pass does."""
    torch.mm(drawn(TOKENS, INPUTS).detach(), drawn(INPUTS, OUTPUTS).detach(), out=torch.empty(0).bfloat16())


def eager_attention() -> None:
    """Products of batches of matrices."""
    query, key = drawn(3, TOKENS, INPUTS), drawn(3, TOKENS, INPUTS)
    backward(torch.bmm(torch.baddbmm(drawn(3, TOKENS, TOKENS), query, key.mT), key))


@pytest.mark.parametrize(
    ("run", "products"),
    [
        (plain, 3),
        (stage_3, 3),
        (skipping, 3),
        (skipping_transposed, 3),
        (transposed, 3),
        (into, 1),
        (eager_attention, 6),
    ],
)
def test_every_product_is_computed_in_float32(
    mended: None, run: Callable[[], None], products: int, tmp_path: Path
) -> None:
    assert innermost_products(run, tmp_path / "trace.json") == [[FLOAT, FLOAT]] * products


def test_without_the_mend_torch_multiplies_bfloat16_itself(tmp_path: Path) -> None:
    assert innermost_products(stage_3, tmp_path / "trace.json") == [[BFLOAT16, BFLOAT16]] * 3


@pytest.mark.parametrize("lora", [False, True])
def test_all_products_of_a_training_step(mended: None, load: Loader, lora: bool, tmp_path: Path) -> None:
    loaded = load("builtin:llama-tiny", dtype=torch.bfloat16)
    model: nn.Module = add_lora(loaded.model, LoraConfig(r=8), loaded.objective, 0) if lora else loaded.model
    ids = torch.arange(1, 25).reshape(2, 12)
    found = innermost_products(lambda: model(input_ids=ids, labels=ids).loss.backward(), tmp_path / "trace.json")
    assert len(found) > 40
    assert {dtype for factors in found for dtype in factors} == {FLOAT}


def attention_gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Of bfloat16 numbers, computed by the operator that `scaled_dot_product_attention` uses, in `dtype`."""
    query, grad = drawn(1, 2, 40, INPUTS).detach(), drawn(1, 2, INPUTS, 40).detach().mT.contiguous()
    output, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, query, query, 0.0, True)
    tensors = [each.to(dtype) for each in (grad, query, query, query, output)]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, sums, 0.0, True)
    return tuple(each.bfloat16() for each in gradients)


def test_attention_differentiates_in_float32() -> None:
    """Its products never pass an operator, so only the rounding of the gradients shows it."""
    exact, rounded = attention_gradients(torch.float32), attention_gradients(torch.bfloat16)
    assert not all(map(torch.equal, rounded, exact))
    installed = FloatProducts()
    try:
        found = attention_gradients(torch.bfloat16)
    finally:
        installed.remove()
    assert all(map(torch.equal, found, exact))


@pytest.mark.parametrize("piece", [1, 40, 1 << 20])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 5, 40), (40, 5, 3), (1, 64, 9), (4, 0, 6), (5, 1, 5)])
def test_the_product_is_the_exact_one_rounded_once(
    monkeypatch: pytest.MonkeyPatch, piece: int, rows: int, inner: int, columns: int
) -> None:
    monkeypatch.setattr(bfloat16, "PIECE_ELEMENTS", piece)
    # Small integers, so that every order of additions is exact.
    generator = torch.Generator().manual_seed(rows)
    a, b, addend = (
        torch.randint(-8, 9, shape, generator=generator).bfloat16()
        for shape in ((rows, inner), (columns, inner), (columns,))
    )
    exact = a.double() @ b.double().t()
    assert torch.equal(in_float32(a, b.t()), exact.bfloat16())
    assert torch.equal(in_float32(a, b.t(), addend, beta=2, alpha=3), (3 * exact + 2 * addend.double()).bfloat16())
    out = torch.full((rows, columns), float("nan")).bfloat16()
    assert in_float32(a, b.t(), torch.full((columns,), float("nan")), beta=0, out=out) is out
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize(
    ("dtype", "transposed", "multiplied_in"),
    [
        (torch.bfloat16, True, BFLOAT16),
        (torch.bfloat16, False, FLOAT),  # no dot products
        (torch.float64, True, "Tensor(double)"),
    ],
)
def test_thin_dot_products_and_other_dtypes_stay_with_torch(
    mended: None, dtype: torch.dtype, transposed: bool, multiplied_in: str, tmp_path: Path
) -> None:
    token, weight = drawn(1, INPUTS).detach().to(dtype), drawn(OUTPUTS, INPUTS).detach().to(dtype)
    factor = weight.t() if transposed else weight.t().contiguous()
    assert innermost_products(lambda: token @ factor, tmp_path / "trace.json") == [[multiplied_in] * 2]


def test_operands_that_do_not_fit_get_torchs_message(mended: None) -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(drawn(3, 4), drawn(3, 4))
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(drawn(3, 4), drawn(4, 4).float())


IN_PROCESS = """
import json, torch
from cl_dist.models import bfloat16
lacks = bfloat16.lacks_instructions()
bfloat16.mend_products()
print(json.dumps([lacks, bfloat16._installed is not None]))
"""


@pytest.mark.parametrize(("oldest", "capability"), [(True, "avx2"), (False, "default")])
def test_only_cpus_without_the_instructions_are_mended(oldest: bool, capability: str) -> None:
    """What decides is what oneDNN may use; torch's own loops, which ATEN_CPU_CAPABILITY restricts, do not matter."""
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": "AVX2" if oldest else "DEFAULT",
        "ATEN_CPU_CAPABILITY": capability,
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS], env=environment, capture_output=True, text=True, check=True
    )
    lacks, installed = json.loads(done.stdout)
    assert lacks is installed
    assert lacks or not oldest
    assert ("torch uses no bfloat16 instructions on this CPU" in done.stderr) is lacks

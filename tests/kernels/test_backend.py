"""Paths, threads and compiled variants."""

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.engine.device import set_matmul_precision
from cl_dist.kernels import backend, row_magnitude, weight_grad_on_gpu
from cl_dist.kernels.backend import SMALL, Launch, blocks, cpu_jit, power_of_two
from tests.ranks import REPOSITORY


def run(code: str) -> str:
    """Run a program with two threads in a separate process and return what it prints."""
    script = "import os, sys, torch\ntorch.set_num_threads(2)\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_tensors_stay_off_the_gpu_path() -> None:
    assert backend.path_of(torch.zeros(1)) == "cpu"
    assert backend.path_of(torch.zeros(1, device="meta")) == "torch"


@given(number=st.integers(1, 10**6), block=st.integers(1, 5000))
def test_sizes(number: int, block: int) -> None:
    assert (blocks(number, block) - 1) * block < number <= blocks(number, block) * block
    assert power_of_two(number) // 2 < number <= power_of_two(number)
    assert power_of_two(number).bit_count() == 1


def test_the_oldest_tested_triton_is_the_oldest_supported_one() -> None:
    (supported,) = re.findall(r'"triton>=([\d.]+),<4;', (REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    (tested,) = re.findall(r"^TRITONS \?= (.*)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    oldest = min(tuple(int(part) for part in version.split(".")[:2]) for version in tested.split())
    assert supported == ".".join(str(part) for part in oldest)
    assert oldest >= backend.OLDEST_TRITON


def test_an_empty_launch_does_nothing() -> None:
    Launch(None, (0,), {}).run()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_little_work_and_one_thread_use_no_pool(two_threads: None) -> None:
    kernel = cpu_jit(lambda x: x)
    assert kernel.sized(SMALL - 1) is kernel.serial
    assert kernel.sized(SMALL) is kernel.parallel
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert kernel.sized(SMALL) is kernel.serial
    assert torch.get_num_threads() == 1


def test_kernels_called_from_several_threads_at_once(two_threads: None) -> None:
    y = torch.randn(256, 1024)
    expected = row_magnitude(y)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: row_magnitude(y), range(20)))
    assert all(torch.equal(result, expected) for result in results)


def test_forks_before_and_after_a_kernel_has_started_threads() -> None:
    out = run("""
        from cl_dist.kernels import backend, row_magnitude

        def in_a_child(function):
            child = os.fork()
            if child == 0:
                os._exit(function())
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        def threads_and_result():
            return backend._pool.threads() + 10 * torch.equal(row_magnitude(y), expected)

        y = torch.randn(256, 1024)
        torch.set_num_threads(1)
        expected = row_magnitude(y)
        torch.set_num_threads(2)
        check = threads_and_result
        print(in_a_child(check), check(), in_a_child(check), check())
    """)
    assert out.split() == ["12", "12", "11", "12"]


def test_without_triton_and_without_a_folder_for_compiled_code() -> None:
    out = run("""
        sys.modules["triton"] = None
        from numba.core import caching
        caching.CacheImpl._locator_classes = []
        from cl_dist.kernels import backend, row_magnitude
        print(backend.triton, row_magnitude(torch.ones(2, 2)).tolist())
    """)
    assert out.strip() == "None [1.0, 1.0]"


def test_a_full_disk_under_the_folder_for_compiled_code(tmp_path: Path) -> None:
    code = f"""
    import resource
    os.environ["NUMBA_CACHE_DIR"] = "{tmp_path}"
    from cl_dist.kernels import row_magnitude
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.write(1, repr(row_magnitude(torch.tensor([[1.0, -3.0]])).tolist()).encode())
    """
    assert run(code) == "[0.25, 0.75]"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_go_to_triton() -> None:
    assert backend.path_of(torch.zeros(1, device="cuda")) == "triton"


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    """Whatever a test sets, the next one starts with PyTorch's default."""
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_can_be_read_however_it_was_set(matmul_precision: None) -> None:
    assert not backend.allows_tf32()
    torch.set_float32_matmul_precision("high")
    assert backend.allows_tf32()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    assert backend.allows_tf32()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not backend.allows_tf32()


def test_the_products_precision_follows(matmul_precision: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert weight_grad_on_gpu._precision(torch.float32) == "tf32"
    assert weight_grad_on_gpu._precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize("tf32", [True, False])
def test_the_recipes_setting_leaves_both_interfaces_readable(matmul_precision: None, tf32: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee" if tf32 else "tf32"  # as a plugin may have done
    set_matmul_precision(tf32)
    assert backend.allows_tf32() is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")

"""`cl-dist doctor`"""

from __future__ import annotations

import pytest
import torch

from cl_dist import machine
from tests.cli.conftest import Command
from tests.driver import answers, driver_folder


class TestDoctor:
    """`cl-dist doctor`"""

    def test_checks_everything_a_run_needs(self, command: Command) -> None:
        code, output, _ = command("doctor")
        found = {line[9:].split("  ")[0].strip() for line in output.splitlines()}
        assert {"cl-dist", "torch", "deepspeed", "C++ compiler", "devices", "disk", "ranks"} <= found
        assert code == int("PROBLEM" in output)

    def test_reports_what_is_missing(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        code, output, _ = command("doctor")
        assert code == 1
        assert "PROBLEM  C++ compiler   no-such-compiler not found; DeepSpeed needs one" in output

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch could use the GPU")
    def test_reports_a_gpu_that_cannot_be_used(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(machine, "DRIVER_LIBRARY", str(driver_folder() / "libcuda.so.1"))
        for name, value in answers(gpus=8).items():
            monkeypatch.setenv(name, value)
        code, output, _ = command("doctor")
        assert code == 1
        line = next(line for line in output.splitlines() if "devices" in line)
        assert line.startswith("PROBLEM  devices        this machine has 8 × NVIDIA H100 80GB HBM3, but the installed")

    def test_reports_who_started_the_ranks(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert "this is rank 1 of 2, started by torchrun or deepspeed" in command("doctor")[1]

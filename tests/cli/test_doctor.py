"""`cl-dist doctor`"""

from __future__ import annotations

import pytest

from tests.cli.conftest import Command


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

    def test_reports_who_started_the_ranks(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert "this is rank 1 of 2, started by torchrun or deepspeed" in command("doctor")[1]

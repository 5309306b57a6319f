"""A DeepSpeed release whose shards are unknown is recognised before it is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.sharding import check
from cl_dist.sharding.check import check_deepspeed


def test_the_pinned_release_is_fine() -> None:
    assert check_deepspeed() == []


def test_another_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DEEPSPEED_VERSION", "0.20.0")
    (problem,) = check_deepspeed()
    assert "deepspeed 0.19.8 is installed" in problem
    assert "0.20.0" in problem


def test_a_missing_attribute_is_named_with_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check._ATTRIBUTES, "runtime/engine.py", ("_take_model_step", "_no_such_attribute"))
    (problem,) = check_deepspeed()
    assert problem.startswith("deepspeed/runtime/engine.py lacks _no_such_attribute")


def test_a_moved_file_lacks_everything(tmp_path: Path) -> None:
    problems = check._missing_attributes(tmp_path)
    assert len(problems) == len(check._ATTRIBUTES)

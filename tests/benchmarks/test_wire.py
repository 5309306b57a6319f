"""The link itself is tested in `test_network.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_dist.benchmarks.training import StepSize
from cl_dist.benchmarks.wire import check_link, planned_bytes
from cl_dist.errors import ClDistError
from tests.cli.conftest import Command, command

__all__ = ["command"]
SIZE = StepSize(hidden=64, intermediate=176, heads=1, key_value_heads=1, layers=2, tokens=8, threshold=0.7)
WORDS = 1024
UNTRACKED = 2 * WORDS * 64 + 5 * 64  # embedding, head, norms
TRACKED = 2 * (4 * 64 * 64 + 3 * 64 * 176)
KEPT = 2 * (4 * 19 * 64 + 2 * 53 * 64 + 19 * 176)
"""Elements in the kept rows: of 64 rows 19 are above the 0.7 quantile, of 176 rows 53."""


@pytest.mark.parametrize(("stage", "elements"), [(1, 1.5), (2, 1.5)])
def test_a_dense_step_sends_gradients_and_weights(stage: int, elements: float) -> None:
    """An all-reduce between two ranks sends as much as there is, an all-gather half of it."""
    sent = sum(planned_bytes(SIZE, stage).values())
    assert sent == pytest.approx(4 * elements * (TRACKED + UNTRACKED), rel=1e-3)  # padding


def test_the_interface_counts_what_the_formula_says(command: Command) -> None:
    arguments = ("--hidden", "64", "--tokens", "8", "--rate", "800mbit", "--runs", "1", "--threads", "1", "--json")
    code, output, error = command("bench", "wire", *arguments)
    assert code == 0, error
    document = json.loads(output)
    if "skipped" in document:
        pytest.skip(document["skipped"])
    sent = {way: found["median"] for way, found in document["bytes_per_rank"].items()}
    # Headers, acknowledgements and messages of a few numbers come on top; another way around the link would be less.
    for way in ("dense", "off"):
        assert 4 * 1.5 * (TRACKED + UNTRACKED) < sent[way] < 1.03 * 4 * 1.5 * (TRACKED + UNTRACKED)
    assert 4 * 1.5 * (KEPT + UNTRACKED) < sent["compact"] < 1.05 * 4 * 1.5 * (KEPT + UNTRACKED)
    assert document["bytes_compact_over_dense"]["median"] == sent["compact"] / sent["dense"]
    assert document["step_compact_over_dense"]["median"] > 0
    assert document["optimizer_compact_over_dense"]["median"] > 0
    phases = {phase: times["dense"]["median"] for phase, times in document["phases"].items()}
    assert list(phases) == ["forward", "backward", "optimizer", "gather"]
    assert sum(phases.values()) == pytest.approx(document["seconds"]["dense"]["median"])


def test_ranks_that_did_not_use_the_link_are_not_measured() -> None:
    check_link([1010.0, 1002.0], 1000)
    sentence = "a rank sent 500 bytes over the link in a dense step, which has to send 1000: the ranks have another way"
    with pytest.raises(ClDistError, match=sentence):
        check_link([1010.0, 500.0], 1000)


def test_without_the_tools_it_is_skipped_with_the_reason(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, output, _ = command("bench", "wire", "--hidden", "64")
    reason = "two network namespaces need the program unshare (package util-linux), not found here"
    assert (code, output) == (0, f"wire: skipped: {reason}\n")
    code, output, _ = command("bench", "wire", "--hidden", "64", "--json")
    assert (code, json.loads(output)["skipped"]) == (0, reason)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--rate fast", "--rate fast: invalid value; allowed: a whole number with kbit, mbit or gbit, such as 400mbit"),
        ("--mask rows", "--mask rows: invalid value; allowed: update, gradient"),
        ("--hidden 50", "--hidden 50: cannot be divided into attention heads; give a multiple of 16"),
        ("--zero-stage 0", "--zero-stage 0: kept rows travel at the stages that shard gradients or state; allowed: 1"),
        ("--device cuda", "--device cuda: the ranks meet over a link between CPUs; leave out --device"),
        ("--dtype float16", "--dtype float16: not supported with ranks; allowed: float32, bfloat16"),
    ],
)
def test_bad_values_are_rejected_in_one_sentence(command: Command, arguments: str, sentence: str) -> None:
    code, output, error = command("bench", "wire", *arguments.split())
    assert (code, output) == (2, "")
    assert error.startswith(f"cl-dist: error: {sentence}")
    assert error.count("\n") == 1

"""A saved state can be loaded by any number of ranks and any ZeRO stage, with the methods' own tensors; damage to any
of its files is reported by all ranks before anything is loaded.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from cl_dist.state.integrity import read_sealed, write_sealed
from cl_dist.state.spans import Span, SpanReader, write_spans
from tests.faults.damage import DAMAGES
from tests.ranks import run_ranks
from tests.state.damage_jobs import FILES

JOBS = "tests.state.snapshot_jobs"


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param((2, 2), (1, 3), marks=pytest.mark.slow),
        pytest.param((2, 3), (2, 1), marks=pytest.mark.slow),
        ((1, 0), (2, 2)),
    ],
    ids=lambda pair: f"{pair[0]}-ranks-zero{pair[1]}",
)
def test_other_ranks_and_stages_read_the_same_state(
    tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    folder = str(tmp_path / "state")
    before = run_ranks(f"{JOBS}:save", saved[0], {"folder": folder, "stage": saved[1]})[0]
    for after in run_ranks(f"{JOBS}:load", loaded[0], {"folder": folder, "stage": loaded[1]}):
        assert after["wrong"] == 0
        assert (after["here"], after["step"], after["missed"]) == (1, 1, True)
        for quantity, total in before.items():
            assert after[quantity] == pytest.approx(total, abs=1e-9), quantity


@pytest.mark.slow
def test_two_ranks_read_the_files_of_256(tmp_path: Path) -> None:
    """A state of one rank, cut into pieces as 256 ranks at stage 3 would write it."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    before = run_ranks(f"{JOBS}:save", 1, {"folder": str(whole), "stage": 1})[0]
    reader, pieces_of = SpanReader(whole, 1), 256
    pieces.mkdir()
    shards = [defaultdict[str, dict[str, Span]](dict) for _ in range(pieces_of)]
    for quantity in ("master", "exp_avg", "exp_avg_sq", "method0.marks"):
        for name in reader.parameters(quantity):
            size = int(reader.require(quantity, name, 0, 0).reach[-1])
            for rank, (start, stop) in enumerate(pairwise(size * rank // pieces_of for rank in range(pieces_of + 1))):
                shards[rank][quantity][name] = Span(start, reader.read(quantity, name, start, stop))
    for rank, spans in enumerate(shards):
        write_spans(pieces, rank, spans)
    write_sealed(pieces / "state.json", {**read_sealed(whole / "state.json"), "writers": pieces_of})
    for after in run_ranks(f"{JOBS}:load", 2, {"folder": str(pieces), "stage": 3}):
        assert after["wrong"] == 0
        for quantity, total in before.items():
            assert after[quantity] == pytest.approx(total, abs=1e-9), quantity


def test_every_damage_to_every_file_is_named_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks("tests.state.damage_jobs:every_damage", 2, {"folder": str(tmp_path)})
    for rank in ranks:
        assert rank["files"] == sorted(FILES)
        assert [(one["file"], one["damage"]) for one in rank["attempts"]] == [(f, d) for f in FILES for d in DAMAGES]
        for one in rank["attempts"]:
            assert one["message"] is not None, f"{one['file']}, {one['damage']}: loaded"
            assert f"bad/{one['file']} is " in one["message"]
            assert "\n" not in one["message"]
            assert one["unchanged"], f"{one['file']}, {one['damage']}: part of it was loaded"
        assert rank["lacking"]["message"] is not None, "an intact state that lacks a quantity was loaded"
        assert "although none of its files is damaged: another release of cl_dist" in rank["lacking"]["message"]
        assert rank["lacking"]["unchanged"]
        assert rank["moved"]
        assert rank["restored"]
    assert ranks[0]["attempts"] == ranks[1]["attempts"], "the ranks report different errors"
    assert [rank["indexes"] for rank in ranks] == [["state.json", "rank-00000.json"], ["rank-00001.json"]]

"""Every file of a saved state, damaged in every way: all ranks name it, none has loaded anything of it."""

from __future__ import annotations

from pathlib import Path

from tests.faults.damage import DAMAGES
from tests.ranks import run_ranks
from tests.state.damage_jobs import FILES


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
        assert rank["lacking"]["message"] is not None, "a whole state that lacks a quantity was loaded"
        assert "although no file of it is damaged: another release of cl_dist" in rank["lacking"]["message"]
        assert rank["lacking"]["unchanged"]
        assert rank["moved"]
        assert rank["restored"]
    assert ranks[0]["attempts"] == ranks[1]["attempts"], "the ranks say different things"

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.benchmarks.growth import curves, ranks


@pytest.fixture(scope="module")
def usage() -> ranks.Usage:
    return ranks.Usage()


def test_a_resume_reads_one_index_instead_of_all(tmp_path: Path, usage: ranks.Usage) -> None:
    ranks.write_state(tmp_path, 3)
    found = {row["way"]: row for row in ranks.measure(tmp_path, 3, usage)}
    assert (found["all"]["index_files"], found["share"]["index_files"]) == (3, 1)
    saved = found["all"]["bytes_read"] - found["share"]["bytes_read"]
    others = [path.stat().st_size for path in tmp_path.glob("*.json")][1:]
    assert len(others) == 2
    assert saved == pytest.approx(sum(others), rel=0.02)
    assert found["share"]["exchanged"] > found["all"]["exchanged"] == 0


def test_one_watchdog_reads_the_pulses_of_all(tmp_path: Path, usage: ranks.Usage) -> None:
    found = {row["way"]: row["files_opened"] for row in ranks.watch(tmp_path, 5, usage)}
    assert found == {"before": 25, "one on duty": 15}


def test_new_rows_replace_those_of_their_way_and_ranks(tmp_path: Path) -> None:
    def row(way: str, number: int, files: int) -> ranks.Row:
        return {"what": "watchdog", "ranks": number, "way": way, "files_opened": files}

    both = (tmp_path, tmp_path)
    ranks.publish([row("before", 4, 16), row("before", 16, 1)], both)
    ranks.publish([row("one on duty", 4, 12), row("before", 16, 256)], both)
    found = [(each["way"], each["ranks"], each["files_opened"]) for each in ranks.read(tmp_path / "growth-ranks.csv")]
    assert found == [("before", "4", "16"), ("one on duty", "4", "12"), ("before", "16", "256")]
    assert (tmp_path / "growth-ranks.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_numbers_have_what_the_picture_shows() -> None:
    rows = ranks.read(curves.RESULTS / f"{ranks.NAME}.csv")
    wanted = {("resume", "before"), ("resume", "share"), ("watchdog", "before"), ("watchdog", "one on duty")}
    for number in (1, 4, 16, 64, 256, 1024):
        assert {(row["what"], row["way"]) for row in rows if row["ranks"] == str(number)} == wanted
    assert (curves.PICTURES / f"{ranks.NAME}.png").exists()

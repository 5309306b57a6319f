from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.sweep.folder import SweepFolder


def test_only_folders_with_a_run_are_found(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    for order, method, seed in (("b", "x", 10), ("b", "x", 2), ("a", "y", 0)):
        sweep.run(order, method, seed).mkdir(parents=True)
        (sweep.run(order, method, seed) / "manifest.json").touch()
    sweep.run("a", "y", 1).mkdir()
    (sweep.runs / "a" / "y" / "seedling").mkdir()
    (sweep.runs / "a" / "y" / "seedling" / "manifest.json").touch()
    assert list(sweep.found()) == [("a", "y", 0), ("b", "x", 10), ("b", "x", 2)]


def test_folders_with_other_contents_are_refused(tmp_path: Path) -> None:
    for names in ((), (".lock",), ("runs",), ("compare.yaml", "notes.txt")):
        folder = tmp_path / "-".join(names or ("empty",))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        SweepFolder(folder).require_own()
    SweepFolder(tmp_path / "absent").require_own()
    with pytest.raises(BadInput, match=r"contains compare.yaml-notes.txt but no compare\.yaml"):
        SweepFolder(tmp_path).require_own()
    with pytest.raises(BadInput, match="is a file; give a folder"):
        SweepFolder(tmp_path / ".lock" / ".lock").require_own()


def test_tables_that_cannot_be_written(tmp_path: Path) -> None:
    SweepFolder(tmp_path / "sweep").write_tables({"table.md": "x"})
    assert (tmp_path / "sweep" / "table.md").read_text() == "x"
    (tmp_path / "sweep" / "table.csv").mkdir()
    with pytest.raises(BadInput, match="the tables cannot be written there: Is a directory"):
        SweepFolder(tmp_path / "sweep").write_tables({"table.csv": "x"})

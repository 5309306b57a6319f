"""The page gets the results of days with a GPU, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.benchmarks.gpu import page
from cl_dist.errors import BadInput
from cl_dist.state.atomic import write_json

BORDERED = f"# Before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n"


def day_of(folder: Path, mode: str = "GPU", device: str = "NVIDIA H200 (SXM)") -> Path:
    folder.mkdir()
    product = {"took_seconds": 1.0, "teraflops": 789.4}
    about = {"mode": mode, "device": device, "status": "done"}
    write_json(folder / "machine.json", {**about, "measurements": {"product bfloat16": product}})
    # A part for which there was no PyTorch has no device.
    skipped = {"mode": None, "device": None, "status": "skipped", "reason": "not installed: x", "measurements": {}}
    write_json(folder / "runs.json", skipped)
    write_json(folder / "summary.json", {})
    return folder


def test_the_page_says_what_is_committed() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_section(text, page.section(page.committed())) == text


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    assert page.committed(tmp_path) == {}
    assert page.with_section(BORDERED, page.section({})).splitlines()[4].startswith("**No GPU has been measured yet.**")


def test_results_are_copied_and_written_once(tmp_path: Path) -> None:
    target = page.take_in(day_of(tmp_path / "day"), tmp_path / "results")
    assert target == tmp_path / "results" / "nvidia-h200-sxm"
    assert sorted(path.name for path in target.iterdir()) == ["machine.json", "runs.json"]
    text = page.with_section(BORDERED, page.section(page.committed(tmp_path / "results")))
    assert "### nvidia-h200-sxm" in text
    assert "Device: NVIDIA H200 (SXM). Mode: GPU." in text
    assert "| product bfloat16 | 789.4 TFLOP/s |" in text
    assert "skipped: not installed: x" in text
    assert "old" not in text
    assert text.startswith("# Before\n")
    assert text.endswith(f"{page.END}\n\nafter\n")
    # The same day again changes nothing, and a later one replaces it.
    assert page.take_in(tmp_path / "day", tmp_path / "results") == target
    assert page.with_section(text, page.section(page.committed(tmp_path / "results"))) == text


def test_cpu_mode_never_reaches_the_page(tmp_path: Path) -> None:
    folder = day_of(tmp_path / "day", mode="CPU mode: tiny sizes", device="EPYC")
    with pytest.raises(BadInput, match=r"day: not measured on a GPU \(CPU mode: tiny sizes\)"):
        page.take_in(folder, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no results; give the folder that"):
        page.take_in(tmp_path, tmp_path / "results")


@pytest.mark.parametrize("text", ["", page.BEGIN, f"{page.END}\n{page.BEGIN}", f"{BORDERED}{page.END}", BORDERED * 2])
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="the page needs one line"):
        page.with_section(text, "new")

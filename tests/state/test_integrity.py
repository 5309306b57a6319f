from __future__ import annotations

import hashlib
import itertools
import threading
from pathlib import Path

import pytest

from cl_dist.state import integrity
from cl_dist.state.integrity import (
    CheckpointDamaged,
    StateUnusable,
    file_sha256,
    read_sealed,
    require_format,
    write_sealed,
)


def test_sealed_content_comes_back(tmp_path: Path) -> None:
    content = {"step": 3, "loss": 0.1, "names": ["é", None, True], 10: "ten", 9: (1, 2)}
    write_sealed(tmp_path / "state.json", content)
    expected = {"step": 3, "loss": 0.1, "names": ["é", None, True], "10": "ten", "9": [1, 2]}
    assert read_sealed(tmp_path / "state.json") == expected


def test_changed_content_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_sealed(path, {"step": 3})
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointDamaged, match=r"state\.json is damaged: its content does not match its checksum"):
        read_sealed(path)


def test_no_flipped_bit_passes_for_what_was_written(tmp_path: Path) -> None:
    content = {"format": 1, "bytes": 4, "spans": [{"parameter": "a.b", "start": 0, "stop": 1}], "x": [0.5, None, True]}
    path = tmp_path / "state.json"
    write_sealed(path, content)
    written = path.read_bytes()
    for position, bit in itertools.product(range(len(written)), range(8)):
        changed = bytearray(written)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        try:
            assert read_sealed(path) == content, f"bit {bit} of byte {position}"
        except CheckpointDamaged:
            continue


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"content": 1}', '{"content": 1, "sha256"', b"\xff\xfe{}"])
def test_what_is_no_sealed_json_is_damaged(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointDamaged, match=r"state\.json is damaged"):
        read_sealed(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match=r"state\.json is missing"):
        read_sealed(tmp_path / "state.json")


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_PAUSES", (0.01, 0.01))
    path = tmp_path / "state.json"
    path.symlink_to(path)  # fails with ELOOP
    sentence = r"state\.json cannot be read: Too many levels of symbolic links; nothing was deleted, and --resume tries"
    with pytest.raises(StateUnusable, match=sentence):
        read_sealed(path)


def test_an_error_that_passes_is_waited_for(tmp_path: Path) -> None:
    path, behind = tmp_path / "state.json", tmp_path / "behind.json"
    write_sealed(behind, {"step": 3})
    path.symlink_to(path)
    timer = threading.Timer(0.2, lambda: behind.rename(path))
    timer.start()
    assert read_sealed(path) == {"step": 3}
    timer.join()


def test_another_releases_format_is_not_damage(tmp_path: Path) -> None:
    require_format(tmp_path, 1, 1)
    with pytest.raises(
        StateUnusable, match="has format 2, written by another release of cl_dist; this one reads 1; nothing"
    ):
        require_format(tmp_path, 2, 1)


def test_numbers_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_sealed(tmp_path / "state.json", {"loss": float("nan")})


def test_a_file_is_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()

"""Paths that cannot be opened, and what is no file."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config.files import cache_folder, expand, is_file, is_folder, is_there, read_bytes, refuse_special_below
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import ModelConfig
from cl_dist.errors import BadInput
from cl_dist.models.check import check_model_config
from cl_dist.tasks.orders import read_order
from tests.tasks.data import as_lines, load_one, records, write_json, write_lines


def make_socket(path: Path) -> None:
    """A socket in the file system."""
    os.chdir(path.parent)  # its own name is all that fits into a socket's address
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": make_socket,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_pipes_and_devices_are_not_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](tmp_path / "f")
    problem = f"f cannot be read: it is {kind}, and a file is needed"
    assert is_there(tmp_path / "f")
    assert not is_file(tmp_path / "f")
    assert not is_folder(tmp_path / "f")
    for refusing in (read_bytes, lambda path: refuse_special_below(path.parent)):
        with pytest.raises(BadInput, match=problem):
            refusing(tmp_path / "f")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("a" * 300, r"the path a{300} cannot be used: File name too long"),
        ("a/" * 3000, "cannot be used: File name too long"),
        ("loop", "the path loop cannot be used: Too many levels of symbolic links"),
        ("a\0b", r"the path a\\0b cannot be used: it contains a character that no path can have"),
        ("a\ud800b", r"the path a\\ud800b cannot be used: it contains a character that no path can have"),
    ],
)
def test_a_path_that_the_system_refuses(
    path: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for look in (is_there, is_file, is_folder, read_bytes):
        with pytest.raises(BadInput, match=problem):
            look(Path(path))


def test_missing_files_are_reported_as_missing(tmp_path: Path) -> None:
    write_lines(tmp_path / "f", ["x"])
    assert not is_there(tmp_path / "g")
    assert not is_there(tmp_path / "f" / "g")
    assert is_file(tmp_path / "f")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    write_lines(tmp_path / "f", ["x"]).chmod(0)
    with pytest.raises(BadInput, match="f cannot be read: Permission denied"):
        read_bytes(tmp_path / "f")


def test_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("~/data", "stream.root") == Path("/home/me/data")
    with pytest.raises(BadInput, match=r"stream.root: ~nobody-here: there is no user 'nobody-here'"):
        expand("~nobody-here", "stream.root")


def in_a_model_folder(root: Path, name: str) -> None:
    check_model_config(ModelConfig(name_or_path=str(root)))


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CL_DIST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as nobody:  # a user whom a container runs as without telling /etc/passwd
        nobody.setattr(os, "getuid", lambda: 4_000_000_000)
        with pytest.raises(BadInput, match="no home folder to keep caches in: set CL_DIST_CACHE to a folder"):
            cache_folder()
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/cl_dist")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_folder() == Path("/fast/cl_dist")
    monkeypatch.setenv("CL_DIST_CACHE", "~/own")
    assert cache_folder() == Path("/home/me/own")


PLACES: list[tuple[str, Callable[[Path, str], Any]]] = [
    ("r.yaml", lambda root, name: load_recipe(str(root / name))),
    ("config.json", in_a_model_folder),
    ("tokenizer.json", in_a_model_folder),
    ("a.jsonl", lambda root, name: load_one(root, path=name)),
    ("a.test.jsonl", lambda root, name: load_one(root, path="a.jsonl")),
    ("a.txt", lambda root, name: load_one(root, format="text", path=name)),
    ("a.csv", lambda root, name: load_one(root, format="huggingface", path=name)),
    ("hub/a.csv", lambda root, name: load_one(root, format="huggingface", path="hub")),
    ("TC/task/labels.json", lambda root, name: load_one(root, format="cl_benchmark", path=".")),
    ("TC/task/test.json", lambda root, name: load_one(root, format="cl_benchmark", path=".")),
    (
        "mine.json",
        lambda root, name: load_one(root, stream={"instruction_file": name}, format="cl_benchmark", path="."),
    ),
    ("order/1/train_tasks.json", lambda root, name: read_order(root / "order")),
]


@pytest.mark.parametrize(("name", "read"), PLACES, ids=[name for name, _ in PLACES])
def test_a_pipe_is_refused_wherever_a_file_is_read(name: str, read: Callable[[Path, str], Any], tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines(records("input", "output", 8)))
    write_json(tmp_path / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    for split in ("train", "test", "dev"):
        write_json(tmp_path / f"TC/task/{split}.json", records("sentence", "label", 8))
    write_json(tmp_path / "TC/task/labels.json", ["yes", "no"])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadInput, match=f"{name} cannot be read: it is a named pipe, and a file is needed"):
        read(tmp_path, name)


def test_an_order_folder_of_another_layout(tmp_path: Path) -> None:
    for content, problem in (({"TC": 3}, "group 'TC' must be a list of data sets, not a number"), ([], "not a list")):
        write_json(tmp_path / "1/train_tasks.json", content)
        with pytest.raises(BadInput, match=problem):
            read_order(tmp_path)
    (tmp_path / "1/train_tasks.json").write_text(json.dumps({"TC": []})[:-1] + ', "TC": []}')
    with pytest.raises(BadInput, match=r"train_tasks.json: field 'TC' is given twice"):
        read_order(tmp_path)

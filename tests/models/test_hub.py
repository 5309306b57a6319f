"""A model that the Hub does not have, does not give out or cannot send: one sentence, before any rank starts.

huggingface_hub is the real one; it asks a server of ours, as HF_ENDPOINT tells it to. It reads its settings when it is
imported, so each group of cases has a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "meta/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model meta/gated is restricted."}),
    "nobody/nothing": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "someone/gguf-only": (404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}),
    "a/bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "a/disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "a/forbidden": (403, {"X-Error-Message": "This token may not"}),
    "a/broken": (500, {}),
    "a/busy": (429, {}),
    "a/portal": (200, {}),
    "a/model": (200, {"X-Repo-Commit": "0" * 40, "ETag": '"1"', "Content-Length": "0"}),
}
"""Status and headers by model, as huggingface.co sends them; `a/slow` never gets an answer."""
ASK = """
import json, sys, time
from cl_dist.config.schema import ModelConfig
from cl_dist.errors import BadInput
from cl_dist.models.hub import check_published
found = {}
for name in sys.argv[1:]:
    try:
        check_published(ModelConfig(name_or_path=name), lambda text: found.setdefault("notice", text))
        found[name] = None
    except BadInput as error:
        found[name] = str(error)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers HEAD requests for one file of a model or of a data set."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        name = "/".join(self.path.removeprefix("/datasets").split("/")[1:3])
        self.asked.append(name)
        if name == "a/slow":
            time.sleep(30)
        status, headers = ANSWERS[name]
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of a Hub of our own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that takes connections and never answers, like a firewall that drops packets."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    own = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")}
    return {**inherited, "PYTHONPATH": str(Path(__file__).parents[2]), **own, **more}


def ask(names: list[str], folder: Path, variables: dict[str, str]) -> dict[str, str | None]:
    """What is said about each model."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names], cwd=folder, env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    found: dict[str, str | None] = json.loads(done.stdout)
    assert all("\n" not in (text or "") for text in found.values())
    return found


def test_what_the_hub_refuses_is_said_with_what_to_do(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "nobody" / "nothings").mkdir(parents=True)
    said = ask([*ANSWERS, "no name/at all", "a/slow"], tmp_path, environment(tmp_path, endpoint))
    bring = (
        "or run `hf download {} --local-dir FOLDER` where there is a network and set model.name_or_path to the folder"
    )
    login = "log in with `hf auth login` or set HF_TOKEN"
    assert said.pop("a/slow", "").startswith(f"model.name_or_path: a/slow is no folder here, and {endpoint} cannot be ")
    assert {name: text and text.removeprefix(f"model.name_or_path: {name} ") for name, text in said.items()} == {
        "meta/gated": f"is gated: accept its licence at {endpoint}/meta/gated, then {login}",
        "nobody/nothing": f"is neither a folder here nor a model on {endpoint}; did you mean nobody/nothings?; check "
        f"the name; if it is private, {login}",
        "someone/gguf-only": f"has no file config.json on {endpoint}; if it holds GGUF files, name one in "
        "model.gguf_file",
        "a/bad-token": f"cannot be loaded: {endpoint} refuses the token; set HF_TOKEN to a valid one, or repeat "
        f"`hf auth login`, {bring.format('a/bad-token')}",
        "a/disabled": f"has been disabled on {endpoint}; use another model",
        "a/forbidden": f"cannot be loaded: {endpoint} does not let this token read it; {login} with one that may, "
        f"{bring.format('a/forbidden')}",
        "a/broken": f"cannot be loaded: {endpoint} answered with status 500, which is its own problem; try again "
        f"later, {bring.format('a/broken')}",
        "a/busy": f"cannot be loaded: {endpoint} answered with status 429, too many requests came from this "
        f"address; try again later, {bring.format('a/busy')}",
        "a/portal": f"cannot be loaded: what answers at {endpoint} is not Hugging Face; check HF_ENDPOINT and the "
        "proxy (HTTPS_PROXY), or use a local folder",
        "a/model": None,
        "no name/at all": "is neither a folder nor a Hugging Face id (owner/name)",
    }
    assert [Hub.asked.count(name) for name in ANSWERS] == [1] * len(ANSWERS)


def test_someone_with_a_token_is_told_something_else(endpoint: str, tmp_path: Path) -> None:
    said = ask(["meta/gated", "nobody/nothing"], tmp_path, environment(tmp_path, endpoint, HF_TOKEN="hf_mine"))
    assert str(said["meta/gated"]).endswith("then wait until its owner lets you in, with a token that may read it")
    assert str(said["nobody/nothing"]).endswith("if it is private, use a token of an account that may read it")


def into_cache(folder: Path, home: Path, name: str) -> Path:
    """Put a model folder into the Hub's cache, as a download does."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_cached_model_is_used_if_the_hub_does_not_answer(
    nowhere: str, endpoint: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    snapshot = into_cache(folders["llama"], tmp_path, "meta/gated")
    broken = into_cache(folders["llama"], tmp_path, "a/part")
    (broken / "model.safetensors").unlink()
    said = ask(["meta/gated"], tmp_path, environment(tmp_path, nowhere))
    assert said["meta/gated"] is None
    assert str(said["notice"]).startswith(f"{nowhere} cannot be reached (")
    assert str(said["notice"]).endswith(f"); meta/gated is loaded from the cache, {snapshot}")
    # The Hub's own answer does not send the libraries offline: what else the run needs may be there.
    assert ask(["meta/gated"], tmp_path, environment(tmp_path, endpoint)) == {"meta/gated": None}
    offline = ask(["meta/gated", "a/part", "a/pert"], tmp_path, environment(tmp_path, nowhere, HF_HUB_OFFLINE="1"))
    assert offline["meta/gated"] is None
    assert f"{broken} has no weights; expected model.safetensors or pytorch_model.bin" in str(offline["a/part"])
    assert str(offline["a/pert"]).startswith(
        f"model.name_or_path: a/pert is neither a folder here nor in the cache ({tmp_path}/hub), and HF_HUB_OFFLINE "
        f"forbids asking {nowhere}; did you mean a/part?; unset it, or run `hf download a/pert"
    )


def test_a_run_ends_with_one_line_before_its_ranks_start(endpoint: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cl_dist", "run", "quickstart", "--set", "model.name_or_path=meta/gated"]
    variables = environment(tmp_path, endpoint)
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    announced, *_, phase = done.stdout.splitlines()
    assert announced.startswith("quickstart: meta/gated, 4 tasks, sequential")
    assert phase == "checking data and model"
    assert done.stderr == (
        f"cl-dist: error: model.name_or_path: meta/gated is gated: accept its licence at {endpoint}/meta/gated, then "
        "log in with `hf auth login` or set HF_TOKEN\n"
    )
    assert not (tmp_path / "runs").exists()

"""A data set that the Hub does not have, does not give out or cannot send: one sentence, after one question.

huggingface_hub and datasets are the real ones; they ask a server of ours (`tests.models.test_hub`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.test_hub import Hub, endpoint, environment, nowhere
from tests.tasks.data import as_lines, records, write_lines

__all__ = ["endpoint", "nowhere"]  # fixtures
READ = """
import json, logging, sys
from pathlib import Path
from cl_dist.config.schema import StreamConfig, TaskConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.stream import load_stream
logging.basicConfig(level=logging.WARNING)
found = {}
for path in sys.argv[1:]:
    stream = StreamConfig(tasks=(TaskConfig(name="t", path=path),))
    try:
        found[path] = len(load_stream(stream, Path("recipes"), TrainConfig())[0].train)
    except BadInput as error:
        found[path] = str(error).removeprefix("task 't': ")
print(json.dumps(found))
"""


def read(paths: list[str], folder: Path, variables: dict[str, str]) -> tuple[dict[str, str], str]:
    """What is said about each data set, and what is logged."""
    (folder / "recipes").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], cwd=folder, env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert all("\n" not in str(text) for text in found.values())
    return found, done.stderr


def test_what_the_hub_refuses_is_said_with_what_to_do(endpoint: str, tmp_path: Path) -> None:
    names = ["meta/gated", "nobody/nothing", "a/bad-token", "a/forbidden", "a/portal"]
    Hub.asked.clear()
    said, logged = read(names, tmp_path, environment(tmp_path, endpoint))
    assert (Hub.asked, logged) == (names, "")
    login = "log in with `hf auth login` or set HF_TOKEN"
    assert said == {
        "meta/gated": f"data set meta/gated is gated: accept its terms at {endpoint}/datasets/meta/gated, then {login}",
        "nobody/nothing": f"there is no folder recipes/nobody/nothing, and no data set nobody/nothing on {endpoint}; "
        f"check the name; if it is private, {login}",
        "a/bad-token": f"data set a/bad-token cannot be loaded: {endpoint} refuses the token; set HF_TOKEN to a valid "
        "one, or repeat `hf auth login`",
        "a/forbidden": f"data set a/forbidden cannot be loaded: {endpoint} does not let this token read it; {login} "
        "with one that may",
        "a/portal": f"data set a/portal cannot be loaded: what answers at {endpoint} is not Hugging Face; check "
        "HF_ENDPOINT and the proxy (HTTPS_PROXY), or use a local folder",
    }


@pytest.mark.parametrize("name", ["a/busy", "a/broken", "someone/any"])
def test_without_an_answer_the_cache_is_all_there_is(name: str, endpoint: str, nowhere: str, tmp_path: Path) -> None:
    place = nowhere if name == "someone/any" else endpoint
    why = {"a/busy": "answered with status 429", "a/broken": "answered with status 500"}.get(name, "cannot be reached")
    said, logged = read([name], tmp_path, environment(tmp_path, place))
    assert said[name].startswith(
        f"data set {name} cannot be loaded: there is no folder recipes/{name}, the cache does not have it, and {place} "
        f"{why}"
    )
    assert said[name].endswith(
        f"; run `hf download {name} --repo-type dataset --local-dir FOLDER` where there is a network and set `path`"
    )
    assert logged.count("\n") == 1
    assert logged.endswith(f"; data set {name} is looked for in the cache\n")


def test_offline_nobody_is_asked(nowhere: str, tmp_path: Path) -> None:
    said, logged = read(["someone/any"], tmp_path, environment(tmp_path, nowhere, HF_HUB_OFFLINE="1"))
    assert f"the cache does not have it, and HF_HUB_OFFLINE forbids asking {nowhere}; unset it" in said["someone/any"]
    assert logged == ""


def test_a_path_to_nothing_is_no_question_to_the_hub(endpoint: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "data/billing/train.jsonl", as_lines(records("input", "output", 4)))
    Hub.asked.clear()
    said, _ = read(
        ["date/billing.jsonl", "date/billing.csv.gz", "data/billing"], tmp_path, environment(tmp_path, endpoint)
    )
    assert said["date/billing.jsonl"].startswith("no file or folder recipes/date/billing.jsonl; recipes has: nothing")
    assert said["date/billing.csv.gz"].startswith("no file or folder recipes/date/billing.csv.gz; ")
    assert "there is a data/billing in the working folder" in said["data/billing"], "the recipe's folder counts"
    assert Hub.asked == []

"""`cl-dist data`"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.tasks.data import as_lines, records, write_lines

RECIPE = """
model: {name_or_path: 'builtin:llama-tiny'}
stream:
  tasks:
    - {name: billing, path: billing, columns: {input: question, output: answer}, eval_fraction: 0.25}
    - {name: talks, path: talks, eval_fraction: 0.25}
    - {name: moods, path: moods.jsonl}
    - {name: prose, format: builtin}
train: {template: chat, max_length: 64}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a task of each kind."""
    bills = ["question,answer", *(f"Invoice {number}?,Pay {number}." for number in range(7)), f"{'x' * 80},Pay 7."]
    write_lines(tmp_path / "billing.csv", bills)
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "And?"), ("assistant", "Fine.")]
    talk = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write_lines(
        tmp_path / "talks.jsonl",
        as_lines(
            [
                {"messages": [*talk["messages"][:3], turn]}
                for turn in ({"role": "assistant", "content": f"Fine {number}."} for number in range(4))
            ]
        ),
    )
    write_lines(tmp_path / "moods.jsonl", as_lines([*records("input", "output", 8), *records("input", "output", 2)]))
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_counts_lengths_labels_and_samples(command: Command, recipe: Path) -> None:
    code, output, error = command("data", recipe)
    assert (code, error) == (0, "")
    billing, talks, moods, prose = re.split(r"\n(?=talks|moods|prose)", output)
    lines = [line for line in billing.splitlines() if not line.startswith("  |")]
    assert lines[:4] == [
        "billing  generation",
        f"  training    6 samples of {recipe.parent}/billing.csv",
        "  read as     prompts and answers, from question and answer",
        f"  evaluation  2 samples held out of {recipe.parent}/billing.csv",
    ]
    assert "  cut         1 of 6 samples lose text before an answer, to fit train.max_length 64" in lines
    assert re.search(r"\n  \| .*user: Invoice \d\?\n  \| assistant: «Pay \d\.</s>»\n", billing)
    assert "  read as     conversations, from messages" in talks
    assert "assistant: «Hello!</s>»user: And?" in talks
    assert re.search(r"assistant: «Fine \d\.</s>»", talks)
    assert "  labels      no (5), yes (5), from the training answers" in moods
    assert "  evaluation  10 samples the training data itself" in moods
    assert "  repeated    2 samples are identical to an earlier one" in moods
    assert re.search(r"  documents   \d+ tokens in the median, 95 % up to \d+, longest \d+", prose)
    assert "between « and »: the loss counts these tokens only." in prose
    assert "note: task 'moods' has no evaluation file" in prose


def test_labels_that_nobody_stated_are_noted_once(command: Command, recipe: Path) -> None:
    _, output, _ = command("data", recipe)
    found = " ".join(output.split())
    assert found.count("labels found in the training answers") == 1
    assert "note: labels found in the training answers: moods 2; to state them, set `labels`" in found
    notes = json.loads(command("data", recipe, "--json")[1])["notes"]
    assert sum("labels found" in note for note in notes) == 1


def test_json_has_the_same(command: Command, recipe: Path) -> None:
    code, output, _ = command("data", recipe, "--json")
    found = json.loads(output)
    billing, talks, moods, _ = found["tasks"]
    assert (code, found["problems"]) == (0, [])
    assert (billing["train"], billing["evaluation"], billing["scored_on"], billing["cut_prompts"]) == (
        6,
        2,
        "held-out",
        1,
    )
    assert set(billing["prompts"]) == {"median", "most_up_to", "longest"}
    assert billing["answers"] == {"median": 7, "most_up_to": 7, "longest": 7}, "six letters and the end"
    assert [piece["text"] for piece in talks["samples"][0]["pieces"] if piece["learnt"]][:1] == ["Hello!</s>"]
    assert moods["labels"] == {"no": 5, "yes": 5}
    for task in found["tasks"]:
        for sample in task["samples"]:
            assert sample["tokens"] <= 64
            assert any(piece["learnt"] for piece in sample["pieces"])


def test_evaluation_samples_that_are_trained_on_are_counted(command: Command, recipe: Path) -> None:
    _, output, _ = command("data", recipe, "--json")
    assert [task["seen"] for task in json.loads(output)["tasks"]] == [0, 1, 0, 0], "all talks start alike"
    write_lines(
        recipe.parent / "moods.test.jsonl", as_lines([*records("input", "output", 3), {"input": "x", "output": "yes"}])
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello!"))]
    write_lines(recipe.parent / "talks.test.jsonl", as_lines([{"messages": turns}]))
    change = "stream.tasks=[{name: moods, path: moods.jsonl}, {name: talks, path: talks.jsonl}]"
    code, output, _ = command("data", recipe, "--set", change)
    assert code == 0
    assert "  seen        3 of 4 evaluation samples are in the training data too\n" in output
    assert "  seen        1 of 1 evaluation samples are in the training data too\n" in output


def test_what_would_stop_a_run_is_shown_with_the_rest(command: Command, recipe: Path) -> None:
    code, output, error = command("data", recipe, "--set", "train.max_target_length=5")
    assert code == 2
    assert "  too long    6 answers, which are refused (train.max_target_length 5, train.long_answers)" in output
    assert (
        "cl-dist: error: a run would stop here: task 'billing', training sample 0: the answer takes 7 tokens" in error
    )
    code, output, _ = command("data", recipe, "--set", "train.max_target_length=5", "--set", "train.long_answers=cut")
    assert code == 0
    assert "  too long    6 answers, which are cut" in output
    code, output, error = command("data", recipe, "--set", "stream.tasks.0.columns={input: qestion, output: answer}")
    assert (code, output) == (2, "")
    assert error.count("\n") == 1
    assert "billing.csv has no column 'qestion'; it has: answer, question; did you mean question?" in error


@pytest.mark.parametrize("model", ["builtin:t5-tiny", "builtin:roberta-tiny"])
def test_other_objectives(command: Command, recipe: Path, model: str) -> None:
    tasks = "stream.tasks=[{name: moods, path: moods.jsonl}]"
    changes = ("--set", f"model.name_or_path={model}", "--set", "train.template=none", "--set", tasks)
    code, output, _ = command("data", recipe, *changes)
    assert code == 0
    assert re.search(r"\n  \| .*question 0.*«yes(</s>)?»\n", output)


@pytest.mark.slow
def test_a_terminal_gets_colours_unless_it_wants_none(recipe: Path) -> None:
    """One process: what is printed depends on where it goes, and on the environment."""
    code = (
        "import os\nfrom cl_dist.cli import main\n"
        f"main(['data', {str(recipe)!r}])\nos.environ['NO_COLOR'] = '1'\nmain(['data', {str(recipe)!r}])\n"
    )
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([sys.executable, "-c", code], stdout=follower, env=environment) as process:
        os.close(follower)
        output = b""
        while True:
            try:
                output += os.read(leader, 1 << 16)
            except OSError:
                break
    os.close(leader)
    assert process.returncode == 0
    first, second = output.decode().replace("\r\n", "\n").split("note: ", 1)
    assert "\x1b[1;32mPay " in first
    assert "\u00ab" not in first
    assert "\x1b" not in second.split("billing  generation")[1]
    assert "\u00abPay " in second

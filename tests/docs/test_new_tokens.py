"""The page on new tokens does what it says, with a tiny model in place of the published one."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cl_dist.models.builtin import EOS_ID, VOCABULARY_SIZE, builtin_config, byte_tokenizer
from tests.cli.conftest import Command, command
from tests.docs.test_pages import blocks_of
from tests.zygote import Zygote

__all__ = ["command"]  # a fixture

PAGE = (Path(__file__).parents[2] / "docs" / "new-tokens.md").read_text(encoding="utf-8")
PUBLISHED = '"HuggingFaceTB/SmolLM2-135M"'
NEW = list(range(VOCABULARY_SIZE, VOCABULARY_SIZE + 4))
TABLES = ["lm_head.weight", "model.embed_tokens.weight"]


def extend(folder: Path, tied: bool = False, spare: int = 0) -> Any:
    """Run the page's first script on a tiny model in `folder`; returns what it writes about the rows."""
    config: Any = builtin_config("builtin:llama-tiny")
    config.tie_word_embeddings, config.vocab_size = tied, VOCABULARY_SIZE + spare
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained("tiny")
    byte_tokenizer("decoder").save_pretrained("tiny")
    script, check = blocks_of(PAGE, "python")
    assert PUBLISHED in script
    (folder / "extend.py").write_text(script.replace(PUBLISHED, '"tiny"'), encoding="utf-8")
    (folder / "check.py").write_text(check, encoding="utf-8")
    runpy.run_path("extend.py")
    return yaml.safe_load((folder / "new-tokens.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tied_head_is_named_once(here: Path) -> None:
    assert extend(here, tied=True) == {"model.embed_tokens.weight": {"rows": NEW}}


def test_tables_with_rows_to_spare_do_not_shrink(here: Path) -> None:
    assert extend(here, spare=7) == {name: {"rows": NEW} for name in TABLES}
    assert load_file(here / "extended" / "model.safetensors")[TABLES[0]].shape[0] == VOCABULARY_SIZE + 7


def test_the_page_as_written(zygote: Zygote, here: Path, command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert extend(here) == {name: {"rows": NEW} for name in TABLES}
    [_, example, *_] = blocks_of(PAGE, "")
    [quoted] = blocks_of(PAGE, "json")
    assert all("<call>" in json.loads(line)["output"] for line in quoted.splitlines())
    places = [f"Town{number}" for number in range(40)]
    lines = [
        json.dumps({"input": f"What is the weather in {each}?", "output": f"<call>weather({each})</call>"})
        for each in places
    ]
    (here / "calls.jsonl").write_text("\n".join(lines), encoding="utf-8")
    first, init, run = (shlex.split(line) for line in example.splitlines())
    assert first == ["python", "extend.py"]
    code, _, error = command(*init[1:])
    assert code == 0, error
    # The ranks run in another folder than this process.
    arguments = [str(here / "my.yaml") if word == "my.yaml" else word for word in run[1:]]
    arguments += ["--set", f"output_dir={here}/runs/my", "--set", "train.epochs=1", "--debug"]
    outcome = zygote.run(arguments, here, world=2, timeout=300)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    settings = yaml.safe_load((here / "runs/my/config.yaml").read_text(encoding="utf-8"))
    assert (settings["zero"]["stage"], settings["train"]["learning_rate"]) == (3, 1e-3)

    [path] = (here / "runs/my/tasks/01-calls/model").glob("*.safetensors")
    before, after = load_file(here / "extended" / "model.safetensors"), load_file(path)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        moved = weight != before[name]
        rows = moved.any(dim=-1).nonzero().flatten().tolist() if weight.dim() > 1 else []
        if name == "lm_head.weight":
            assert rows == NEW
        elif name == "model.embed_tokens.weight":
            assert rows == NEW[:2]  # the data has no results
        else:
            assert not moved.any(), name
    metrics = json.loads((here / "runs/my/metrics.json").read_text(encoding="utf-8"))
    every = sum(weight.numel() for weight in after.values())
    assert list(metrics["kept_share"].values()) == [pytest.approx(2 * 4 * 64 / every)]
    capfd.readouterr()
    runpy.run_path("check.py")
    assert capfd.readouterr().out.splitlines() == [
        f"lm_head.weight rows {NEW}",
        f"model.embed_tokens.weight rows {NEW[:2]}",
    ]


def test_the_text_of_a_new_token_is_one_token(here: Path) -> None:
    extend(here)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained("extended")("<call>x</call>").input_ids
    assert [each for each in ids if each >= VOCABULARY_SIZE] == NEW[:2]
    assert EOS_ID not in ids

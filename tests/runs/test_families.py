"""The three model families, full and with adapters, through the whole system under ZeRO-2 and ZeRO-3 with two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.recipes import write_recipe
from tests.zoo.families import POSITIONS, SPECIMENS
from tests.zygote import Zygote

CLASSES = {
    "llama": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "roberta": AutoModelForSequenceClassification,
}


def trained(zygote: Zygote, folder: Path, family: str, stage: int, lora: bool) -> Path:
    """Run folder after training; fails with the ranks' output if a rank failed."""
    folder.mkdir(exist_ok=True)
    model: dict[str, Any] = {"name_or_path": f"builtin:{family}-tiny", "lora": {"r": 4} if lora else None}
    # A large eps, so that AdamW does not amplify rounding errors of tiny gradients.
    path = write_recipe(folder, model=model, zero={"stage": stage}, train={"eps": 1e-3})
    outcome = zygote.run(["run", str(path), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    return folder / "run"


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow), "roberta"])
def test_both_stages_train_the_same_weights(zygote: Zygote, tmp_path: Path, family: str, lora: bool) -> None:
    runs = [trained(zygote, tmp_path / f"zero{stage}", family, stage, lora) for stage in (2, 3)]
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    for task in ("01-spring", "02-summer"):
        two, three = (load_file(run / "tasks" / task / "model" / name) for run in runs)
        assert two.keys() == three.keys()
        for key, tensor in two.items():
            torch.testing.assert_close(
                tensor, three[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    matrix = json.loads((runs[0] / "metrics.json").read_text())["accuracy_matrix"]
    assert len(matrix) == 3
    assert all(0 <= score <= 1 for row in matrix for score in row)


@pytest.mark.parametrize("family", ["llama", "t5", "roberta"])
def test_what_is_saved_loads_with_transformers_alone(zygote: Zygote, tmp_path: Path, family: str) -> None:
    run = trained(zygote, tmp_path, family, stage=3, lora=False)
    folder = run / "tasks" / "02-summer" / "model"
    model = CLASSES[family].from_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    first = next(iter(stored))
    assert torch.equal(dict(model.named_parameters(remove_duplicate=False))[first].detach(), stored[first])
    assert (folder / "tokenizer.json").exists()


def test_a_saved_adapter_loads_with_peft_alone(zygote: Zygote, tmp_path: Path) -> None:
    base = trained(zygote, tmp_path / "base", "llama", stage=2, lora=False) / "tasks" / "01-spring" / "model"
    path = write_recipe(tmp_path, model={"name_or_path": str(base), "lora": {"r": 4}})
    outcome = zygote.run(["run", str(path), "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    folder = tmp_path / "run" / "tasks" / "02-summer" / "model"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    moved = [float(p.detach().abs().max()) for n, p in model.named_parameters() if ".lora_B." in n]
    assert len(moved) == 14
    assert max(moved) > 0


def test_answers_past_the_last_position_are_refused_before_training(zygote: Zygote, tmp_path: Path) -> None:
    model = {"name_or_path": str(SPECIMENS["GPT-2"].build(tmp_path / "model"))}
    lengths = {"max_length": POSITIONS, "max_target_length": 8}
    evaluation = {"mode": "generate", "max_new_tokens": POSITIONS}
    path = write_recipe(tmp_path, model=model, train=lengths, eval=evaluation)
    outcome = zygote.run(["run", str(path)], tmp_path, world=1)
    assert outcome.codes == [2], "\n".join(outcome.output)
    assert f"eval.max_new_tokens: {POSITIONS} tokens after prompts of up to" in outcome.output[0]
    assert not list((tmp_path / "run").glob("tasks/*"))


def test_a_long_answer_of_the_last_task_is_refused_before_training(zygote: Zygote, tmp_path: Path) -> None:
    """Although the task is tokenised only when its turn comes."""
    for name, answer in (("short", "fine"), ("long", "so " * 60)):
        records = [{"input": f"Question {number}?", "output": answer if number == 5 else "yes"} for number in range(9)]
        for split in ("", ".test"):
            (tmp_path / f"{name}{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    tasks = [{"name": name, "format": "jsonl", "path": f"{name}.jsonl", "labels": []} for name in ("short", "long")]
    path = write_recipe(tmp_path, stream={"tasks": tasks}, train={"max_length": 128, "max_target_length": 32})
    outcome = zygote.run(["run", str(path)], tmp_path, world=2)
    assert outcome.codes == [2, 2], "\n".join(outcome.output)
    assert "task 'long', training sample 5: the answer takes 181 tokens" in "".join(outcome.output)
    assert not list((tmp_path / "run").glob("tasks/*"))

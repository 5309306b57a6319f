"""An exported folder works where cl_dist and DeepSpeed cannot be imported, and computes what our model computes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cl_dist.assembly import load_saved
from cl_dist.errors import BadInput
from cl_dist.export.card import model_card
from cl_dist.export.folder import write_export
from cl_dist.state.saved_models import SavedModel, find_saved
from tests.export.runs import LABELS, write_run
from tests.models.conftest import folders, load  # noqa: F401 - fixtures

FAMILIES = ("llama", "t5", "roberta")
KINDS = ("full", "adapter", "merged")
CHAT = (
    "{% for each in messages %}[{{ each.role }}]{{ each.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ELSEWHERE = """
import json, os, re, sys
sys.modules["cl_dist"] = sys.modules["deepspeed"] = None  # an import of either fails
import torch
from safetensors.torch import save_file
for folder in sys.argv[2:]:
    os.chdir(folder)
    code = re.search(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)[1]
    names = {}
    exec(code, names)  # the example of the model card
    model, ids = names["model"], torch.arange(5, 30)[None]
    apart = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = {"logits": model(input_ids=ids, **apart).logits}
    if model.can_generate():
        found["answer"] = model.generate(**names["inputs"], **(
            {"generation_config": names["GenerationConfig"].from_pretrained(".")} if "GenerationConfig" in names else {}
        ))
    found = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(found, f"{sys.argv[1]}/{os.path.basename(folder)}")
    print(json.dumps(model.config.id2label))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, SavedModel]:  # noqa: F811
    """Saved models by family and whether only an adapter was trained."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for family in FAMILIES:
        for kind, lora in (("full", None), ("adapter", {"r": 3})):
            found[f"{family}-{kind}"] = find_saved(write_run(root / f"{family}-{kind}", folders[family], lora=lora))
    chat = root / "chat"
    shutil.copytree(folders["llama"], chat)
    (chat / "chat_template.jinja").write_text(CHAT)
    found["llama-chat"] = find_saved(write_run(root / "llama-chat", chat, train={"template": "chat", "max_length": 64}))
    return found


@pytest.fixture(scope="module")
def exported(runs: dict[str, SavedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported folders by family and kind."""
    root = tmp_path_factory.mktemp("exported")
    for family in FAMILIES:
        for kind in KINDS:
            saved = runs[f"{family}-{'full' if kind == 'full' else 'adapter'}"]
            write_export(saved, root / f"{family}-{kind}", merge=kind == "merged")
    write_export(runs["llama-chat"], root / "llama-chat")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def elsewhere(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process without cl_dist and DeepSpeed computes with each folder, by the example of its model card."""
    results = tmp_path_factory.mktemp("results")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    names = sorted(exported)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(results), *(str(exported[name]) for name in names)],
        env=variables,
        cwd=results,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    classes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"0"')]
    return {name: {**load_file(results / name), "classes": each} for name, each in zip(names, classes, strict=True)}


def ours(saved: SavedModel) -> torch.Tensor:
    """Logits of the saved model as `cl-dist eval` loads it."""
    model = load_saved(saved.recipe, saved.folder, LABELS).model.eval()
    ids = torch.arange(5, 30)[None]
    apart = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, **apart).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_ours(
    runs: dict[str, SavedModel], elsewhere: dict[str, dict[str, Any]], family: str, kind: str
) -> None:
    """The same weights give the same bits. Merging only changes the order of float32 sums, of at most 256 products in
    these models, so a logit moves by less than 256 roundings of the largest one."""
    wanted = ours(runs[f"{family}-{'full' if kind == 'full' else 'adapter'}"])
    found = elsewhere[f"{family}-{kind}"]["logits"]
    if kind != "merged":
        assert torch.equal(found, wanted)
    bound = 256 * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert (found - wanted).abs().max() <= bound


def test_merged_weights_are_those_of_the_formula(runs: dict[str, SavedModel], exported: dict[str, Path]) -> None:
    base = load_file(Path(runs["llama-adapter"].recipe.model.name_or_path) / "model.safetensors")
    adapter = load_file(exported["llama-adapter"] / "adapter_model.safetensors")
    merged = load_file(exported["llama-merged"] / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    wanted = base[f"{name}.weight"].double() + 32 / 3 * b @ a
    assert torch.allclose(merged[f"{name}.weight"].double(), wanted, rtol=0, atol=4e-6)  # float32 sums of 3 products
    assert not torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"], atol=1e-2)
    assert not [key for key in merged if "lora" in key]
    assert not (exported["llama-merged"] / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_stops_where_the_evaluation_did(
    exported: dict[str, Path], elsewhere: dict[str, dict[str, Any]], kind: str
) -> None:
    for family in ("llama", "t5"):
        settings = json.loads((exported[f"{family}-{kind}"] / "generation_config.json").read_text())
        assert settings["max_new_tokens"] == 32, "half of max_length, as in the recipe"
        assert settings.get("do_sample") in (None, False)
        assert settings["eos_token_id"]
        assert elsewhere[f"{family}-{kind}"]["answer"].shape[1] > 1
    assert not (exported[f"roberta-{kind}"] / "generation_config.json").exists()


def test_a_chat_model_reads_its_template(exported: dict[str, Path], elsewhere: dict[str, dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported["llama-chat"])
    read = tokenizer.decode(elsewhere["llama-chat"]["answer"][0])
    assert "[user]Write here what the model should read.</s>[assistant]" in read


def test_classes_have_their_names(exported: dict[str, Path], elsewhere: dict[str, dict[str, Any]]) -> None:
    for kind in KINDS:
        names = elsewhere[f"roberta-{kind}"]["classes"]
        assert len(names) == LABELS
        assert not any(name.startswith("LABEL_") for name in names.values()), names


def test_the_card_is_one_that_the_hub_reads(exported: dict[str, Path]) -> None:
    for name, folder in exported.items():
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == ("peft" if name.endswith("adapter") else "transformers")
        results = {each.dataset_name: each.metric_value for each in card.data.eval_results or []}
        assert results == {"spring": 0.4, "summer": 0.5}, "the last row of the accuracy matrix"
        assert "| **summer** | 0.4000 | 0.5000 |" in card.content
        assert "| forgetting |" in card.content
        assert str(Path.home()) not in card.content
        assert f"transformers, export | {__import__('transformers').__version__}" in card.content
        assert not re.search(r"base_model: /", card.content), "a folder of this machine is no model on the Hub"


def test_the_model_after_an_earlier_task(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    run = write_run(tmp_path / "run", folders["llama"], done=2)
    saved = find_saved(run, "spring")
    write_export(saved, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (saved.folder / "model.safetensors").read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {each.dataset_name: each.metric_value for each in card.data.eval_results or []} == {
        "spring": 0.2,
        "summer": 0.3,
    }
    with pytest.raises(
        BadInput, match=r"--task sprang: not a finished task of .*; finished: spring, summer; did you mean spring"
    ):
        find_saved(run, "sprang")


def test_the_tasks_of_a_card_are_those_that_the_model_has_learnt(tmp_path: Path) -> None:
    for method, first, second in (
        ("sequential", ("spring",), ("spring", "summer")),
        ("per_task", ("spring",), ("summer",)),
    ):
        run = write_run(tmp_path / method, "builtin:llama-tiny", method={"name": method})
        assert find_saved(run, "spring").learnt == first
        assert find_saved(run).learnt == second
    together = write_run(tmp_path / "multi_task", "builtin:llama-tiny", method={"name": "multi_task"}, steps=(4, 0))
    saved = find_saved(together)
    assert (saved.task, saved.learnt) == ("spring", ("spring", "summer"))
    single = find_saved(tmp_path / "per_task")
    assert "| forgetting |" not in model_card(single, "causal_lm", (), adapter=False)


def test_what_cannot_be_exported_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    full = find_saved(write_run(tmp_path / "full", folders["llama"]))
    builtin = find_saved(write_run(tmp_path / "lora", "builtin:llama-tiny", lora={"r": 2}, done=1))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(
        BadInput, match=r"taken: not empty, and nothing is overwritten; allowed: a new or an empty folder"
    ):
        write_export(full, tmp_path / "taken")
    with pytest.raises(BadInput, match=r"file: not a folder; allowed: a new or an empty one"):
        write_export(full, tmp_path / "taken" / "file")
    with pytest.raises(
        BadInput, match=r"cannot be created, because .*taken/file is not a folder that you may write to"
    ):
        write_export(full, tmp_path / "taken" / "file" / "out")
    with pytest.raises(BadInput, match="--merge: this run trained the whole model"):
        write_export(full, tmp_path / "out", merge=True)
    with pytest.raises(BadInput, match=r"builtin:llama-tiny, exists only in cl_dist, .* add --merge"):
        write_export(builtin, tmp_path / "out")
    weights = full.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BadInput, match="the saved model is missing or damaged"):
        write_export(full, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_export(builtin, tmp_path / "out", merge=True)
    assert "The run has not finished" in (tmp_path / "out" / "README.md").read_text()


def test_without_its_data_a_classifier_keeps_numbers(load: Any, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{n}", "answer": "abc"[n % 3]}) + "\n" for n in range(9)))
    stream = {"tasks": [{"name": "only", "format": "jsonl", "path": str(data)}]}
    run = write_run(tmp_path / "run", "builtin:roberta-tiny", tasks=("only",), done=1, stream=stream)
    data.unlink()
    said: list[str] = []
    write_export(find_saved(run), tmp_path / "out", notify=said.append)
    assert len(said) == 1
    assert said[0].startswith("the classes keep their numbers, because the data with their names cannot be read: ")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["0"] == "LABEL_0"

"""ZeRO-3 on two ranks: models are sharded from the start, and have and learn the same weights as unsharded ones.

The ranks are started once for all cases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from cl_dist.benchmarks.memory import growth
from cl_dist.config.schema import LoraConfig
from cl_dist.models.load import AUTO_CLASSES
from cl_dist.models.lora import add_lora
from tests.models.conftest import SEED, Loader
from tests.models.rank_jobs import digest
from tests.ranks import run_ranks

Case = dict[str, Any]

MODELS = [
    ("builtin:llama-tiny", "causal_lm"),
    ("builtin:llama-tiny", "classification"),
    ("builtin:t5-tiny", "seq2seq_lm"),
    ("builtin:roberta-tiny", "classification"),
    ("builtin:roberta-tiny", "masked_lm"),
]
# Every model, in full and with adapters; one of the two uses activation checkpointing.
STEPPED: list[Case] = [
    {"name": name, "objective": objective, "lora": lora, "steps": True, "checkpointing": lora == (number % 2 == 0)}
    for number, (name, objective) in enumerate(MODELS)
    for lora in (False, True)
]
BFLOAT16: list[Case] = [
    {"name": name, "objective": objective, "lora": lora, "dtype": "bfloat16"}
    for name, objective, lora in [*((name, objective, False) for name, objective in MODELS), (*MODELS[0], True)]
]
FOLDERS = [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("roberta", "masked_lm"), ("roberta", "classification")]


STORED = ("shards", "bin", "bin-shards", "bin-old", "experts", "wide")
"""Folders made by `stored`, in float32; except for `wide`, which shows the memory that loading takes."""


@pytest.fixture(scope="module")
def stored(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models in several kinds of files, by name."""
    tokenizer = load("builtin:llama-tiny").tokenizer
    sizes = {"vocab_size": len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    tied = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=True, **sizes)
    )
    experts = MixtralForCausalLM(
        MixtralConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_local_experts=3, **sizes)
    )
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=12, **sizes))
    folders = {name: tmp_path_factory.mktemp(name) for name in STORED}
    for name, folder in folders.items():
        tokenizer.save_pretrained(folder)
        model = {"experts": experts, "wide": wide.bfloat16()}.get(name, tied)
        if not name.startswith("bin"):
            model.save_pretrained(folder, max_shard_size="10MB" if name == "wide" else "20KB")
            assert len(list(folder.glob("*.safetensors"))) > 2
            continue
        model.config.save_pretrained(folder)
        weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        _save_bin(folder, weights, files=2 if name == "bin-shards" else 1, zipped=name != "bin-old")
    return folders


def _save_bin(folder: Path, weights: dict[str, torch.Tensor], files: int, zipped: bool) -> None:
    """Write PyTorch files as transformers names them."""
    if files == 1:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    places = {key: f"pytorch_model-{number % files + 1:05d}-of-{files:05d}.bin" for number, key in enumerate(weights)}
    for file in set(places.values()):
        torch.save({key: value for key, value in weights.items() if places[key] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def case_id(case: Case) -> str:
    """A readable name for a case."""
    marks = ["lora"] * bool(case.get("lora")) + ["checkpointing"] * bool(case.get("checkpointing"))
    return "-".join([Path(case["name"]).name, case["objective"], case.get("dtype", "float32"), *marks])


@pytest.fixture(scope="module")
def results(
    folders: dict[str, Path], stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """The results of all ranks, by case name."""
    exports = tmp_path_factory.mktemp("exports")
    on_disk = [{"name": str(folders[name]), "objective": objective} for name, objective in FOLDERS]
    exported = [
        {
            "name": "builtin:roberta-tiny",
            "objective": "classification",
            "lora": lora,
            "export": str(exports / str(lora)),
        }
        for lora in (False, True)
    ]
    names = [case_id(case) for case in STEPPED + BFLOAT16]
    names += [f"folder-{name}-{objective}" for name, objective in FOLDERS] + ["export", "export-lora"]
    cases = STEPPED + BFLOAT16 + on_disk + exported
    names += [f"stored-{name}" for name in STORED]
    cases += [{"name": str(stored[name]), "lora": name == "shards", "dtype": "bfloat16"} for name in STORED]
    ranks = run_ranks("tests.models.rank_jobs:sharded", 2, {"cases": cases, "cache_dir": str(exports)}, timeout=400)
    found = {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}
    found["folders"] = [{"exports": str(exports)}]
    return found


def whole_digests(load: Loader, case: Case) -> dict[str, str]:
    """Digests of the same model, built unsharded in this process."""
    loaded = load(case["name"], case["objective"], dtype=getattr(torch, case.get("dtype", "float32")))
    model: torch.nn.Module = loaded.model
    if case.get("lora"):
        model = add_lora(loaded.model, LoraConfig(r=3), loaded.objective, SEED)
    return {name: digest(parameter.detach()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", STEPPED + BFLOAT16, ids=case_id)
def test_sharded_weights_equal_unsharded_ones(results: dict[str, Any], load: Loader, case: Case) -> None:
    expected = whole_digests(load, case)
    for rank in results[case_id(case)]:
        assert rank["digests"] == expected
        assert rank["dtypes"] == [f"torch.{case.get('dtype', 'float32')}"]
        assert all("modules_to_save" in name for name in rank["whole"]), "the base is not sharded"


@pytest.mark.parametrize("case", STEPPED, ids=case_id)
def test_steps_equal_those_of_plain_pytorch(results: dict[str, Any], case: Case) -> None:
    for rank in results[case_id(case)]:
        assert rank["whole_in_engine"] == []
        assert rank["moved"] > 1e-2
        assert rank["difference"] < 2e-6


@pytest.mark.parametrize(("name", "objective"), FOLDERS)
def test_folders_load_sharded(
    results: dict[str, Any], load: Loader, folders: dict[str, Path], name: str, objective: str
) -> None:
    expected = whole_digests(load, {"name": folders[name], "objective": objective})
    for rank in results[f"folder-{name}-{objective}"]:
        assert rank["whole"] == []
        assert rank["digests"] == expected


@pytest.mark.parametrize("name", STORED)
def test_weights_from_every_kind_of_file(
    results: dict[str, Any], load: Loader, stored: dict[str, Path], name: str
) -> None:
    case = {"name": stored[name], "lora": name == "shards", "dtype": "bfloat16"}
    expected = whole_digests(load, {**case, "objective": "auto"})
    buffers = {key: digest(buffer) for key, buffer in load(stored[name]).model.named_buffers()}
    for rank in results[f"stored-{name}"]:
        assert rank["whole"] == []
        assert rank["digests"] == expected
        assert {key.removeprefix("base_model.model."): value for key, value in rank["buffers"].items()} == buffers


def test_no_rank_ever_holds_the_whole_model(results: dict[str, Any], stored: dict[str, Path]) -> None:
    whole = sum(file.stat().st_size for file in stored["wide"].glob("*.safetensors"))
    for rank in results["stored-wide"]:
        # Its half, and what it takes to gather and send around modules of at most 1 MiB.
        assert rank["growth"] < whole / 2 + (20 << 20) < whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_sharding_a_rank_holds_the_model_once(load: Loader, stored: dict[str, Path], dtype: str) -> None:
    """In its own dtype, and converted to another."""
    kept = []
    found = growth(lambda: kept.append(load(stored["wide"], dtype=getattr(torch, dtype))), torch.device("cpu"))
    size = sum(parameter.nbytes for parameter in kept.pop().model.parameters())
    # Pages of the files may count besides: the kernel takes those back.
    files = sum(file.stat().st_size for file in stored["wide"].glob("*.safetensors")) if dtype == "float32" else 0
    assert found is not None
    assert found < files + 1.25 * size


@pytest.mark.parametrize("lora", [False, True])
def test_sharded_models_are_exported_whole(results: dict[str, Any], load: Loader, lora: bool) -> None:
    folder = Path(results["folders"][0]["exports"]) / str(lora)
    case: Case = {"name": "builtin:roberta-tiny", "objective": "classification", "lora": lora}
    if lora:
        back = PeftModel.from_pretrained(load(case["name"]).model, folder, autocast_adapter_dtype=False)
    else:
        back = AUTO_CLASSES["classification"].from_pretrained(folder)
    assert {name: digest(parameter.detach()) for name, parameter in back.named_parameters()} == whole_digests(
        load, case
    )

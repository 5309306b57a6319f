"""A model that cannot be loaded is refused in one sentence, before torch is imported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_dist.config.schema import ModelConfig
from cl_dist.errors import BadInput
from cl_dist.models.check import (
    WITHOUT_SDPA,
    check_model_config,
    check_safetensors,
    local_folder,
    resolve_objective,
)
from cl_dist.models.load import AUTO_CLASSES

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


def configure(**values: object) -> Callable[[Path], None]:
    """Change entries of config.json; None removes one."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | values
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")

    return change


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def turn_into_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def add_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "b.gguf").write_bytes(b"GGUF")


BAD_FOLDERS: list[tuple[Callable[[Path], None], dict[str, str], str]] = [
    (remove("config.json"), {}, r"has no config\.json; expected is a model folder as written by save_pretrained"),
    (turn_into_adapter, {}, r"has no config\.json; it holds an adapter; use the model that the adapter was trained on"),
    (add_gguf, {}, r"has no config\.json; to load a GGUF file set model\.gguf_file to one of b\.gguf"),
    (write("config.json", "{"), {}, r"config\.json is not valid JSON"),
    (write("config.json", "[1]"), {}, r"config\.json must hold a JSON object, it holds a list"),
    (
        configure(architectures=["ViTForImageClassification"]),
        {},
        r"is a ViTForImageClassification; allowed are text models",
    ),
    (configure(architectures=True), {}, r"architectures in .*config\.json is true; allowed: a list of strings"),
    (configure(architectures=[5]), {}, r"architectures in .*config\.json is \[5\]; allowed: a list of strings"),
    (
        configure(num_attention_heads=-1),
        {},
        r"num_attention_heads in .*config\.json is -1, but a size cannot be negative",
    ),
    (configure(architectures=None, model_type=None), {}, r"names neither architectures nor model_type"),
    (remove("tokenizer.json"), {}, r"has no tokenizer; expected one of tokenizer\.json, "),
    (remove("model.safetensors"), {}, r"has no weights; expected model\.safetensors or pytorch_model\.bin, or their"),
    (write("tokenizer.json", ""), {}, r"tokenizer\.json is empty; download the tokenizer again"),
    (write("tokenizer.json", "<html>"), {}, r"tokenizer\.json is not valid JSON \(.*\); download the tokenizer again"),
    (write("tokenizer.json", '{"a": 1}'), {}, r"tokenizer\.json is not a tokenizer: it has no object `model`; take"),
    (write("tokenizer.json", POINTER), {}, r"tokenizer\.json is not the file itself but a pointer to it: run `git lfs"),
    (write("model.safetensors", POINTER), {}, r"model\.safetensors is not the file itself but a pointer to it: run"),
    (cut_off, {}, r"model\.safetensors is damaged or truncated: it has \d+ bytes, its header says \d+"),
    (damage_header, {}, r"model\.safetensors is damaged: its safetensors header cannot be read"),
    (write("model.safetensors", ""), {}, r"model\.safetensors is damaged: its safetensors header cannot be read"),
    (write("model.safetensors.index.json", '{"weight_map": {"a": 5}}'), {}, r"index\.json is not a safetensors index"),
    (write("model.safetensors.index.json", "{}"), {}, r"index\.json is not a safetensors index"),
    (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        {},
        r"names files that do not exist: model-00001-of-00002\.safetensors",
    ),
    (
        configure(is_encoder_decoder=True),
        {"objective": "causal_lm"},
        r"encoder-decoder family, which allows seq2seq_lm, not",
    ),
    (
        configure(architectures=["Gemma2ForCausalLM"], model_type="gemma2"),
        {"attention": "sdpa"},
        r"^model\.attention: .*, a Gemma2ForCausalLM, has no sdpa; allowed are auto and eager$",
    ),
    (configure(), {"gguf_file": "x.gguf"}, r"there is no x\.gguf in .*; its \.gguf files: none$"),
    (add_gguf, {"gguf_file": "x.gguf"}, r"there is no x\.gguf in .*; its \.gguf files: b\.gguf"),
    (add_gguf, {"gguf_file": "../b.gguf"}, r"there is no \.\./b\.gguf in "),
    (
        write("b.gguf", "text"),
        {"gguf_file": "b.gguf"},
        r"b\.gguf is not a GGUF file \(it does not begin with the bytes GGUF\)",
    ),
]


@pytest.mark.parametrize(("spoil", "settings", "message"), BAD_FOLDERS, ids=[m[:40] for _, _, m in BAD_FOLDERS])
def test_a_bad_folder_is_refused(
    folders: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], settings: dict[str, str], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    check_model_config(ModelConfig(name_or_path=str(folder)))
    spoil(folder)
    with pytest.raises(BadInput, match=message) as error:
        check_model_config(ModelConfig(name_or_path=str(folder), **settings))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


BAD_NAMES: list[tuple[dict[str, str], str]] = [
    (
        {"name_or_path": "builtin:llama-big"},
        r"no built-in model builtin:llama-big; allowed are builtin:llama-tiny, builtin:t5",
    ),
    (
        {"name_or_path": "builtin:t5-tiny", "gguf_file": "a.gguf"},
        r"model\.gguf_file: is a\.gguf, but builtin:t5-tiny is",
    ),
    (
        {"name_or_path": "builtin:t5-tiny", "objective": "masked_lm"},
        r"encoder-decoder family, which allows seq2seq_lm, not m",
    ),
    (
        {"name_or_path": "builtin:roberta-tiny", "objective": "causal_lm"},
        r"allows classification and masked_lm, not causal_lm",
    ),
    (
        {"name_or_path": "/nowhere/model"},
        r"there is no folder /nowhere/model; allowed are a folder in Hugging Face format, a H",
    ),
    ({"name_or_path": "./model"}, r"there is no folder model; allowed are"),
    ({"name_or_path": "runs/a/model"}, r"there is no folder runs/a/model; allowed are"),
    ({"name_or_path": "~no-such-user/model"}, r"there is no folder ~no-such-user/model; allowed are"),
    ({"name_or_path": " "}, r"there is no folder  ; allowed are"),
    ({"name_or_path": __file__}, r"test_check\.py is a file; allowed is a folder"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_NAMES, ids=[str(s["name_or_path"]) for s, _ in BAD_NAMES])
def test_a_bad_name_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_model_config(ModelConfig(**settings))  # type: ignore[arg-type]


def test_a_gguf_file_as_model_gets_a_hint(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(
        BadInput, match=re.escape(f"a.gguf is a file; set it to the folder {tmp_path} and model.gguf_file to a.gguf")
    ):
        check_model_config(ModelConfig(name_or_path=str(file)))


def test_a_classifier_needs_labels() -> None:
    model = ModelConfig(name_or_path="builtin:roberta-tiny", objective="classification")
    check_model_config(model, ["a"])
    check_model_config(model)
    with pytest.raises(BadInput, match=r"^model\.objective: classification needs tasks with labels, and this"):
        check_model_config(model, [])


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-2-7b-hf", "t5-large", "a_b/c.d"])
def test_ids_are_not_taken_for_paths(name: str) -> None:
    assert local_folder(name) is None
    check_model_config(ModelConfig(name_or_path=name))


def test_auto_is_the_first_objective_of_the_family() -> None:
    chosen = [resolve_objective("auto", family, "m") for family in ("decoder", "encoder", "encoder-decoder")]
    assert chosen == ["causal_lm", "classification", "seq2seq_lm"]


def test_a_whole_safetensors_file_is_accepted(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        check_safetensors(folder / "model.safetensors")


def test_the_check_imports_no_torch() -> None:
    code = (
        "import sys, cl_dist.models.check; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow  # imports every model of transformers
def test_the_model_types_without_sdpa_are_those_of_transformers() -> None:
    found: dict[str, bool] = {}
    for auto_class in AUTO_CLASSES.values():
        for config, model in auto_class._model_mapping.items():
            classes = model if isinstance(model, tuple | list) else (model,)
            found[config.model_type] = all(each._supports_sdpa for each in classes)
    assert {name for name, sdpa in found.items() if not sdpa} == WITHOUT_SDPA

"""A model is read from the files that transformers picks in its folder, in the same order of preference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_dist.config.schema import ModelConfig
from cl_dist.models.files import MODEL_FILES, TOKENIZER_FILES, locate_model

SHARDS = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BINARIES = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]


def files(folder: Path, patterns: tuple[str, ...], **model: str) -> list[str]:
    place = locate_model(ModelConfig(name_or_path=str(folder), **model))  # type: ignore[arg-type]
    assert place is not None
    return sorted(name for name, _ in place.files(patterns, code=False))


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (["model.safetensors", *SHARDS, *BINARIES, "training_args.bin"], ["model.safetensors"]),
        ([*SHARDS, *BINARIES, "consolidated.safetensors"], SHARDS),
        (["pytorch_model.bin", *BINARIES, "optimizer.pt"], ["pytorch_model.bin"]),
        (BINARIES, BINARIES),
        (["odd.safetensors"], ["odd.safetensors"]),
    ],
)
def test_the_weights_that_are_loaded(tmp_path: Path, there: list[str], read: list[str]) -> None:
    for name in [*there, "config.json", "tokenizer.json", "README.md"]:
        (tmp_path / name).touch()
    assert files(tmp_path, MODEL_FILES) == sorted([*read, "config.json"])
    assert files(tmp_path, TOKENIZER_FILES) == ["tokenizer.json"]


def test_an_index_names_its_files(tmp_path: Path) -> None:
    shards = ["weights-a.safetensors", "b[1].safetensors"]
    for name in [*shards, "c.safetensors", "model-00001-of-00002.bin"]:
        (tmp_path / name).touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shards[0], "y": shards[1], "z": shards[0], "w": 3, "v": "/etc"}}))
    assert files(tmp_path, MODEL_FILES) == sorted([index.name, *shards])
    for nonsense in ("", "[]", '{"weight_map": []}', "[" * 100_000):
        index.write_text(nonsense)
        assert files(tmp_path, MODEL_FILES) == [index.name]


def test_tokenizers_of_every_kind(tmp_path: Path) -> None:
    names = ["tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "x.tiktoken"]
    names += ["source.spm", "bpe.codes", "dict.txt", "sentencepiece.bpe.model"]
    names += ["special_tokens_map.json", "added_tokens.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in [*names, "model.safetensors", "config.json"]:
        (tmp_path / name).touch()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").touch()
    assert files(tmp_path, TOKENIZER_FILES) == sorted([*names, "additional_chat_templates/tools.jinja"])


def test_a_gguf_file_holds_everything(tmp_path: Path) -> None:
    for name in ("m.gguf", "config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    for patterns in (MODEL_FILES, TOKENIZER_FILES):
        assert files(tmp_path, patterns, gguf_file="m.gguf") == ["gguf"]

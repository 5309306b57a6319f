"""Which files a model and its tokenizer are read from; opens none of them."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.models.check import local_folder

WEIGHT_FILES = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("*.safetensors", "*.bin"),
)
"""Patterns of weights in the order in which transformers looks for them: the first that are there are read."""
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.*")
"""What a model is read from beside its weights."""
TOKENIZER_FILES = (
    "*token*.json",
    "special_tokens_map.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.vocab",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "bpe.codes",
    "dict.txt",
    "tekken.json",
    "normalizer.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
"""What a tokenizer is read from."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelPlace:
    """Where a model's files are."""

    folder: Path | None
    """None: the model is built in."""
    gguf_file: str | None
    """The file in `folder` that has everything, where it is one in GGUF format."""
    revision: str | None
    """Commit of the Hugging Face Hub."""

    def files(self, patterns: Sequence[str], *, code: bool) -> Iterator[tuple[str, Path]]:
        """Name and path of the files that fit `patterns` (`MODEL_FILES` bring the weights with them), and of the
        model's own Python code where that is run.
        """
        assert self.folder is not None
        if self.gguf_file is not None:
            yield "gguf", self.folder / self.gguf_file  # whatever it is called
            return
        wanted = [*patterns, *(self._weights() if patterns is MODEL_FILES else ()), *(("*.py",) if code else ())]
        found = {path for pattern in wanted for path in self.folder.glob(pattern) if path.is_file()}
        yield from ((path.relative_to(self.folder).as_posix(), path) for path in found)

    def _weights(self) -> Sequence[str]:
        assert self.folder is not None
        for patterns in WEIGHT_FILES:
            if any(self.folder.glob(patterns[0])):
                return [*patterns, *_shards(self.folder / patterns[0])]
        return ()


def _shards(index: Path) -> set[str]:
    """The files that an index of weights names, whatever they are called; none where it is no index."""
    if not index.name.endswith(".index.json"):
        return set()
    # What is no index will be named by whoever loads it.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = json.loads(index.read_bytes())["weight_map"].values()
        return {glob.escape(name) for name in names if isinstance(name, str) and name and not name.startswith("/")}
    return set()


def locate_model(model: ModelConfig) -> ModelPlace | None:
    """Where the files of a model are; None where it is on the Hub and not on this machine.

    Of a model of the Hub it is the version that was downloaded last, which is what loading it has just used.
    """
    if model.name_or_path in BUILTIN_FAMILIES:
        return ModelPlace(None, None, None)
    folder = local_folder(model.name_or_path) or _downloaded(model)
    if folder is None:
        return None
    commit = folder.resolve().name
    return ModelPlace(folder, model.gguf_file, commit if _COMMIT.fullmatch(commit) else None)


def _downloaded(model: ModelConfig) -> Path | None:
    """The folder of a model of the Hub in its cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name_or_path, model.gguf_file or "config.json")
    return Path(found).parent if isinstance(found, str) else None

"""Finds the files that a model and its tokenizer are read from; opens only the index of the weights."""

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
"""Patterns of weight files in transformers' order of preference: it reads the first that exist."""
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.*")
"""What a model is read from, apart from its weights."""
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
    """Where the files of a model are."""

    folder: Path | None
    """None for a built-in model."""
    gguf_file: str | None
    """For a model in GGUF format, the one file in `folder` that holds everything."""
    revision: str | None
    """Commit on the Hugging Face Hub."""

    def files(self, patterns: Sequence[str], *, code: bool) -> Iterator[tuple[str, Path]]:
        """Yield name and path of each file that matches `patterns`; `MODEL_FILES` includes the weights.

        With `code` the model's own Python files come too.
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
    """Return the file names that an index of weights lists; none if `index` is not an index."""
    if not index.name.endswith(".index.json"):
        return set()
    # Loading the model reports a broken index.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = json.loads(index.read_bytes())["weight_map"].values()
        return {glob.escape(name) for name in names if isinstance(name, str) and name and not name.startswith("/")}
    return set()


def locate_model(model: ModelConfig) -> ModelPlace | None:
    """Find the files of a model; None for a Hub model that is not on this machine.

    For a Hub model this is the last downloaded version, the one that loading it has just used.
    """
    if model.name_or_path in BUILTIN_FAMILIES:
        return ModelPlace(None, None, None)
    folder = local_folder(model.name_or_path) or _downloaded(model)
    if folder is None:
        return None
    commit = folder.resolve().name
    return ModelPlace(folder, model.gguf_file, commit if _COMMIT.fullmatch(commit) else None)


def _downloaded(model: ModelConfig) -> Path | None:
    """Return a Hub model's folder in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name_or_path, model.gguf_file or "config.json")
    return Path(found).parent if isinstance(found, str) else None

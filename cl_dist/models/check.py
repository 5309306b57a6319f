"""Checks a model before anything expensive happens: reads only small files, and does not import torch.

`check_model_config` runs in the first seconds of a run. `models.load` builds on it, and refuses what only the loaded
configuration can show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_file, is_folder, refuse_special, refuse_special_below
from cl_dist.config.objectives import FACTS, Family, ObjectiveName, objectives_of
from cl_dist.config.schema import BUILTIN_FAMILIES, BUILTIN_MODELS, ModelConfig, TrainConfig
from cl_dist.config.words import listed, show
from cl_dist.errors import BadInput
from cl_dist.models.position_settings import Positions, configured_positions
from cl_dist.tasks.template import no_chat_template

BUILTIN_PREFIX = "builtin:"
TEXT_ARCHITECTURES = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "Model",
)
"""Endings of the class names that a text model lists under `architectures` in config.json."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("d_model", "d_ff", "num_layers", "num_heads", "n_embd", "n_layer", "n_head"),
)
"""Entries of config.json that transformers does not validate before it builds a model."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# fmt: off
WITHOUT_SDPA = frozenset((
    "big_bird", "bigbird_pegasus", "bloom", "canine", "codegen", "convbert", "cpmant", "deberta", "deberta-v2",
    "deepseek_v4", "falcon_mamba", "flaubert", "flint", "fnet", "fsmt", "funnel", "gemma2", "git", "got_ocr2",
    "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "hy_v4", "ibert",
    "inkling2_text", "layoutlmv2", "layoutlmv3", "led", "lilt", "longformer", "longt5", "luke", "mamba", "mamba2",
    "markuplm", "megatron-bert", "mimo_v2_flash", "mpnet", "mpt", "mra", "mvp", "nllb-moe", "nystromformer",
    "openai-gpt", "pegasus_x", "perceiver", "prophetnet", "reformer", "rembert", "roformer", "rwkv", "squeezebert",
    "switch_transformers", "t5gemma", "tapas", "trocr", "vaultgemma", "xglm", "xlm", "xlnet", "xlstm", "yoso",
))
# fmt: on
"""Model types without sdpa in transformers; a test compares them with its classes."""
WEIGHT_SUFFIXES = ("*.safetensors", "*.bin")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HEADER_LIMIT = 100 * 2**20
"""In bytes; safetensors refuses longer headers."""


def check_model_config(model: ModelConfig, label_names: Sequence[str] | None = None) -> None:
    """Raise BadInput if names and small files show that `model` cannot be loaded.

    `label_names` are the stream's labels, if known yet. A Hugging Face id is not looked up (`models.hub`).
    """
    name = model.name_or_path
    if name.startswith(BUILTIN_PREFIX):
        _check_builtin(model)
    elif (folder := local_folder(name)) is not None:
        check_folder(folder, model)
    needs_labels = model.objective != "auto" and FACTS[model.objective].needs_labels
    if needs_labels and label_names is not None and not label_names:
        raise BadInput(f"model.objective: {model.objective} needs tasks with labels, and this stream has none")


def check_chat_template(model: ModelConfig) -> None:
    """Raise BadInput if a local model's files show that its tokenizer has no chat template."""
    if model.name_or_path in BUILTIN_FAMILIES or model.gguf_file is not None:
        return  # the built-in decoder has one, and a GGUF file's tokenizer has to be loaded first
    folder = local_folder(model.name_or_path)
    if folder is not None and not _has_chat_template(folder):
        raise no_chat_template(model.name_or_path)


def _has_chat_template(folder: Path) -> bool:
    """Whether the folder has a chat template, as a separate file or in the tokenizer's settings."""
    if any((folder / name).exists() for name in TEMPLATE_FILES):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")


def resolve_objective(objective: str, family: Family, name: str) -> ObjectiveName:
    """The objective that `auto` stands for, or `objective` itself if the model `family` supports it; else BadInput."""
    allowed = objectives_of(family)
    if objective == "auto":
        return allowed[0]
    for candidate in allowed:
        if objective == candidate:
            return candidate
    raise BadInput(
        f"model.objective: {name} is of the {family} family, which allows {listed(allowed, last='and')}, "
        f"not {objective}"
    )


def known_objective(model: ModelConfig) -> ObjectiveName | None:
    """The objective that a model will be trained for, if names and small files show it."""
    family = BUILTIN_FAMILIES.get(model.name_or_path) or _family_in_folder(model)
    return None if family is None else resolve_objective(model.objective, family, model.name_or_path)


def check_positions(model: ModelConfig, train: TrainConfig) -> None:
    """Raise BadInput if a local model's config.json shows that `train.max_length` or, for an encoder-decoder,
    `train.max_target_length` exceeds its positions.
    """
    folder = local_folder(model.name_or_path)
    if folder is None or model.gguf_file is not None or model.name_or_path in BUILTIN_FAMILIES:
        return
    longest = configured_positions(read_config(folder))
    refuse_long(longest, model.name_or_path, train.max_length, train.max_target_length)


def refuse_long(longest: Positions, name: str, max_length: int, max_target_length: int | None) -> None:
    """Raise BadInput for a setting that exceeds the model's positions."""
    if longest.source is not None and max_length > longest.source:
        raise BadInput(
            f"train.max_length: {max_length} is too long for {name}, which has {longest.source} positions; allowed is "
            f"at most {longest.source}"
        )
    if longest.target is not None and max_target_length is not None and max_target_length > longest.target:
        raise BadInput(
            f"train.max_target_length: {max_target_length} is too long for {name}, whose decoder has {longest.target} "
            f"positions; allowed is at most {longest.target}"
        )


def _family_in_folder(model: ModelConfig) -> Family | None:
    folder = local_folder(model.name_or_path)
    if folder is None or model.gguf_file is not None:
        return None
    config = read_config(folder)
    names = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder"):
        return "encoder-decoder"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "decoder"
    return "encoder" if any(name.endswith("ForMaskedLM") for name in names) else None


def local_folder(name: str) -> Path | None:
    """The folder that `name` refers to, or None for a Hugging Face id.

    Raises BadInput for a name that can only be a path but is not a folder.
    """
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, it accepts an unknown user
    if is_folder(path):
        refuse_special_below(path)
        return path
    refuse_special(path)
    if is_file(path):
        hint = (
            f"set it to the folder {path.parent} and model.gguf_file to {path.name}"
            if is_gguf(path)
            else "allowed is a folder"
        )
        raise BadInput(f"model.name_or_path: {name} is a file; {hint}")
    if _looks_like_path(name):
        raise BadInput(
            f"model.name_or_path: there is no folder {path}; allowed are a folder in Hugging Face format, "
            f"a Hugging Face id (owner/name) or one of {', '.join(BUILTIN_MODELS)}"
        )
    return None


def is_gguf(path: Path) -> bool:
    """Whether the file has the suffix of the GGUF format."""
    return path.suffix.lower() == ".gguf"


def _looks_like_path(name: str) -> bool:
    """Whether `name` cannot be a Hugging Face id (`name` or `owner/name`)."""
    return not name.strip() or name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count("/") > 1


def _check_builtin(model: ModelConfig) -> None:
    if model.name_or_path not in BUILTIN_FAMILIES:
        raise BadInput(
            f"model.name_or_path: there is no built-in model {model.name_or_path}; "
            f"allowed are {', '.join(BUILTIN_MODELS)}"
        )
    if model.gguf_file is not None:
        raise BadInput(
            f"model.gguf_file: is {model.gguf_file}, but {model.name_or_path} is built in and has no files; "
            "leave gguf_file out, or set model.name_or_path to the folder of the GGUF file"
        )
    resolve_objective(model.objective, BUILTIN_FAMILIES[model.name_or_path], model.name_or_path)


def check_folder(folder: Path, model: ModelConfig) -> None:
    """Raise BadInput if small files in a model's folder, or their absence, show that it cannot be loaded."""
    if model.gguf_file is not None:
        _check_gguf_file(folder, model.gguf_file)
        return
    config = read_config(folder)
    _check_architecture(config, folder)
    if config.get("is_encoder_decoder"):
        resolve_objective(model.objective, "encoder-decoder", str(folder))
    if model.attention == "sdpa" and not model.trust_remote_code and config.get("model_type") in WITHOUT_SDPA:
        raise no_sdpa(model, (config.get("architectures") or [config["model_type"]])[0])
    if not model.trust_remote_code and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BadInput(f"model.name_or_path: {folder} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")
    _check_tokenizer_files(folder)
    for file in _weight_files(folder):
        check_safetensors(file)
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_SUFFIXES):
        raise BadInput(
            f"model.name_or_path: {folder} has no weights; expected model.safetensors or pytorch_model.bin, or their "
            "parts and the index: copy the whole folder, or download the model again"
        )


def _check_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that hold something else, as copies and clones that went wrong do."""
    for name in TOKENIZER_FILES:
        file = folder / name
        if not file.is_file():
            continue
        _refuse_pointer(file)
        if file.stat().st_size == 0:
            raise BadInput(f"model.name_or_path: {file} is empty; download the tokenizer again")
        if name == "tokenizer.json":
            _check_tokenizer_json(file)


def _check_tokenizer_json(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"model.name_or_path: {file} is not valid JSON ({error}); download the tokenizer again"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise BadInput(
            f"model.name_or_path: {file} is not a tokenizer: it has no object `model`; take the file of the model that "
            "the tokenizer belongs to"
        )


def _refuse_pointer(file: Path) -> None:
    """Refuse what a clone without Git LFS leaves in place of a large file."""
    with open(file, "rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadInput(
                f"model.name_or_path: {file} is not the file itself but a pointer to it: run `git lfs pull` in "
                f"{file.parent}, or fetch the model with `hf download`"
            )


def _check_gguf_file(folder: Path, name: str) -> None:
    """Refuse a file that is not directly in the folder, or does not begin with the bytes GGUF."""
    there = sorted(path.name for path in folder.iterdir() if is_gguf(path))
    if name not in there:
        found = ", ".join(there) or "none"
        raise BadInput(f"model.gguf_file: there is no {name} in {folder}; its .gguf files: {found}")
    with open(folder / name, "rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput(
                f"model.gguf_file: {folder / name} is not a GGUF file (it does not begin with the bytes GGUF)"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json. Raises BadInput if it is missing or unusable."""
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"model.name_or_path: {folder} has no config.json{_instead_of_config(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"model.name_or_path: {file} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadInput(f"model.name_or_path: {file} must hold a JSON object, it holds a {type(config).__name__}")
    _check_entries(config, file)
    return config


def _check_entries(config: dict[str, Any], file: Path) -> None:
    """Refuse entries of the wrong type or out of range that are read here or that transformers does not validate."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list | None) or not all(isinstance(name, str) for name in architectures or []):
        raise BadInput(
            f"model.name_or_path: architectures in {file} is {show(architectures)}; allowed: a list of strings"
        )
    for name in SIZES:
        size = config.get(name)
        if isinstance(size, int) and size < 0:
            raise BadInput(f"model.name_or_path: {name} in {file} is {size}, but a size cannot be negative")


def _instead_of_config(folder: Path) -> str:
    """A hint, based on what the folder contains instead."""
    if (folder / "adapter_config.json").is_file():
        return "; it holds an adapter; use the model that the adapter was trained on"
    if gguf := sorted(path.name for path in folder.iterdir() if is_gguf(path)):
        return f"; to load a GGUF file set model.gguf_file to one of {', '.join(gguf)}"
    return "; expected is a model folder as written by save_pretrained"


def _check_architecture(config: dict[str, Any], folder: Path) -> None:
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith(TEXT_ARCHITECTURES) for name in architectures):
        raise unsupported_architecture(str(folder), ", ".join(map(str, architectures)))
    if not architectures and "model_type" not in config:
        raise BadInput(f"model.name_or_path: {folder / 'config.json'} names neither architectures nor model_type")


def unsupported_architecture(name: str, architecture: str) -> BadInput:
    """The error for a model of none of the three families."""
    return BadInput(
        f"model.name_or_path: {name} is a {architecture}; allowed are text models: decoders (like Llama), "
        "encoders (like RoBERTa) or encoder-decoders (like T5)"
    )


def no_sdpa(model: ModelConfig, architecture: str) -> BadInput:
    """The error for a recipe that demands sdpa of a model without it."""
    return BadInput(f"model.attention: {model.name_or_path}, a {architecture}, has no sdpa; allowed are auto and eager")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder. If it has an index, these are the files in it, and all must exist."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        there = [(folder / name).is_file() for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"model.name_or_path: {index} is not a safetensors index ({error})") from error
    if missing := [name for name, found in zip(names, there, strict=True) if not found]:
        raise BadInput(f"model.name_or_path: {index} names files that do not exist: {', '.join(missing)}")
    return [folder / name for name in names]


def check_safetensors(file: Path) -> None:
    """Raise BadInput if a safetensors file is truncated or its header is damaged.

    The file consists of the header's length (8 bytes, little endian), a JSON header, and the tensors. The header says
    where the last tensor ends, which has to be the end of the file.
    """
    _refuse_pointer(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 0 < length <= min(size - 8, HEADER_LIMIT) else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise BadInput(f"model.name_or_path: {file} is damaged: its safetensors header cannot be read") from error
    if expected != size:
        raise BadInput(
            f"model.name_or_path: {file} is damaged or truncated: it has {size} bytes, its header says {expected}"
        )

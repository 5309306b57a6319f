"""Converts a GGUF file once into a folder in Hugging Face format, which then loads like any other model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers.utils.hub import cached_file

from cl_dist.errors import BadInput, ClDistError


def converted_gguf(source: str, gguf_file: str, cache_dir: Path) -> Path:
    """Return the folder below `cache_dir` with the model (float32 safetensors) and tokenizer of a GGUF file.

    The first rank of each machine converts the file unless that was done before. All ranks return, or raise its error,
    together.

    Args:
        source: A folder or a Hugging Face id.
        gguf_file: Name of the file in it.
        cache_dir: Where converted models are kept.

    Raises:
        BadInput: The file cannot be converted.
    """
    error = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            _convert_once(source, gguf_file, cache_dir)
        except ClDistError:  # a signal that asks to stop
            raise
        except Exception as raised:  # raised on every rank below: one rank alone would leave the others waiting
            error = f"model.gguf_file: {gguf_file} of {source} cannot be converted ({raised})"
    for message in _from_all_ranks(error):
        if message is not None:
            raise BadInput(message)
    return _target(source, gguf_file, cache_dir)


def _convert_once(source: str, gguf_file: str, cache_dir: Path) -> None:
    """Convert into a temporary folder and rename it, so that the target is either complete or absent."""
    target = _target(source, gguf_file, cache_dir)
    if target.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="gguf-", dir=cache_dir))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars without a switch
            _convert(source, gguf_file, temporary)
        temporary.rename(target)
    except OSError:
        if not target.exists():  # otherwise another job was faster, and its folder will do
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _target(source: str, gguf_file: str, cache_dir: Path) -> Path:
    """Name a folder after the file (path, size, inode, times of change) and the version of the converting library.

    `cp -p` and `rsync -t` can replace a file by another one of the same size and modification time; its inode or
    `ctime` changes then.
    """
    file = os.path.realpath(str(cached_file(source, gguf_file)))
    state = os.stat(file)
    times = f"{state.st_mtime_ns}:{state.st_ctime_ns}"
    identity = f"{file}:{state.st_size}:{state.st_ino}:{times}:{transformers_version}"
    return cache_dir / f"gguf-{Path(gguf_file).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _convert(source: str, gguf_file: str, folder: Path) -> None:
    config = AutoConfig.from_pretrained(source, gguf_file=gguf_file)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are plain float32 by now, but transformers refuses to save a model that is marked as quantised.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)


def _from_all_ranks(error: str | None) -> list[str | None]:
    """Return every rank's `error` (collective where there are several ranks)."""
    if not (dist.is_available() and dist.is_initialized()):
        return [error]
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors

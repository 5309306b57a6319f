"""GGUF files: converted once into a folder in Hugging Face format, then loaded like any other model."""

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils.hub import cached_file

from cl_dist.errors import BadInput, ClDistError


def converted_gguf(source: str, gguf_file: str, cache_dir: Path) -> Path:
    """The folder below `cache_dir` with the model (float32 safetensors) and the tokenizer of a GGUF file.

    `source` is a folder or a Hugging Face id. The first rank of each machine converts where that has not been done
    before; all ranks return, or raise its error, together.
    """
    error = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            _convert_once(source, gguf_file, cache_dir)
        except ClDistError:  # a signal that asks to stop
            raise
        except Exception as raised:  # told on every rank below: one that raised alone would leave the others waiting
            error = f"model.gguf_file: {gguf_file} of {source} cannot be converted ({raised})"
    for told in _from_all_ranks(error):
        if told is not None:
            raise BadInput(told)
    return _target(source, gguf_file, cache_dir)


def _convert_once(source: str, gguf_file: str, cache_dir: Path) -> None:
    """Convert into a temporary folder and rename it: the target is either whole or not there."""
    target = _target(source, gguf_file, cache_dir)
    if target.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="gguf-", dir=cache_dir))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
            _convert(source, gguf_file, temporary)
        temporary.rename(target)
    except OSError:
        if not target.exists():  # else another job was faster; its folder serves
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _target(source: str, gguf_file: str, cache_dir: Path) -> Path:
    """A folder name that changes with the file (place, size, inode, times of change) and with the converting library.

    `cp -p` and `rsync -t` keep the size of a file and its time of modification where they put another one in its
    place; inode or `ctime` tell.
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
    _forget_quantisation(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """The weights are plain float32 by now, but transformers saves no model that is marked as quantised."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _from_all_ranks(error: str | None) -> list[str | None]:
    """Every rank's `error`; a meeting point of all ranks where there are several."""
    if not (dist.is_available() and dist.is_initialized()):
        return [error]
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors

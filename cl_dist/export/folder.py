"""Writes a model that a run has saved into a plain Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from cl_dist.assembly import dtype_of, load_saved
from cl_dist.config.files import cache_folder
from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.errors import BadInput
from cl_dist.evaluation.inference import greedy
from cl_dist.export.card import model_card
from cl_dist.export.check import check_export
from cl_dist.models.export import export_model, is_readable_export
from cl_dist.models.load import load_tokenizer
from cl_dist.state.atomic import make_folder, publishing, write_json
from cl_dist.state.saved_models import SavedModel
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.stream import load_stream


def write_export(
    saved: SavedModel, out: Path, *, merge: bool = False, notify: Callable[[str], None] = lambda text: None
) -> None:
    """Write the model, its tokenizer, its generation settings and its model card into `out`, all or nothing.

    The folder needs transformers alone or, for an adapter, transformers and peft. A merge is computed in float32 and
    stored in the precision of the run.

    Args:
        saved: The model.
        out: A new or an empty folder.
        merge: Merge an adapter into its base model.
        notify: Called with a sentence about what is left out.

    Raises:
        BadInput: `check_export` refuses it, the saved model is damaged, or what it needs is gone.
    """
    check_export(saved, out, merge=merge)
    if not is_readable_export(saved.folder):
        raise BadInput(f"{saved.folder}: the saved model is missing or damaged; export another task with --task")
    tokenizer, objective = load_tokenizer(saved.source, cache_folder())
    labels = _labels(saved, notify) if FACTS[objective].needs_labels else ()
    make_folder(out.absolute().parent)
    with publishing(out.absolute()) as temporary:
        if merge:
            _write_merged(saved, temporary, len(labels))
        else:
            shutil.copytree(saved.folder, temporary, dirs_exist_ok=True)
            tokenizer.save_pretrained(temporary)
        if saved.is_adapter and not merge:
            _name_base(temporary, saved.recipe.model.name_or_path)
        if labels and (temporary / "config.json").exists():
            _name_classes(temporary, labels, saved.recipe.model.trust_remote_code, notify)
        if FACTS[objective].generates:
            _generation_settings(saved, tokenizer, objective, temporary).save_pretrained(temporary)
        card = model_card(saved, objective, labels, adapter=saved.is_adapter and not merge)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _labels(saved: SavedModel, notify: Callable[[str], None]) -> Sequence[str]:
    """The names of a classifier's classes, which only the data has. An adapter's base model cannot do without."""
    try:
        return label_names(load_stream(saved.recipe.stream, saved.recipe_dir, saved.recipe.train))
    except BadInput as error:
        if saved.is_adapter:
            raise
        notify(f"the classes keep their numbers, because the data with their names cannot be read: {error}")
        return ()


def _name_classes(folder: Path, labels: Sequence[str], trust: bool, notify: Callable[[str], None]) -> None:
    """Write the labels into config.json, where transformers looks for the names of classes."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    if config.num_labels != len(labels):
        notify(f"the classes keep their numbers: there are {config.num_labels}, but the data has {len(labels)} labels")
        return
    config.id2label, config.label2id = dict(enumerate(labels)), {name: number for number, name in enumerate(labels)}
    config.save_pretrained(folder)


def _write_merged(saved: SavedModel, folder: Path, labels: int) -> None:
    """Write base model plus adapter as one model."""
    loaded = load_saved(saved.recipe, saved.folder, labels, dtype=torch.float32)
    assert isinstance(loaded.model, PeftModel)
    # Added in bfloat16, an adapter's small product would be rounded to the grid of the large weights twice.
    merged: Any = loaded.model.merge_and_unload()
    merged = merged.to(dtype_of(saved.recipe))
    export_model(merged, loaded.tokenizer, folder, dict(merged.named_parameters()))


def _generation_settings(
    saved: SavedModel, tokenizer: PreTrainedTokenizerBase, objective: ObjectiveName, folder: Path
) -> GenerationConfig:
    """Greedy decoding with the length and the stops of the evaluation, so that `generate` answers as it was scored."""
    base = saved.source
    if (folder / "config.json").exists():  # an adapter has none
        base = replace(base, name_or_path=str(folder), gguf_file=None)
    file = {} if base.gguf_file is None else {"gguf_file": base.gguf_file}
    config: Any = AutoConfig.from_pretrained(base.name_or_path, trust_remote_code=base.trust_remote_code, **file)
    pad, stops = tokenizer.pad_token_id, Encoder(tokenizer, objective, saved.recipe.train, ()).stops
    assert isinstance(pad, int)
    settings = greedy(config, tokenizer, pad, saved.recipe.eval.max_new_tokens, stops)
    if FACTS[objective].answer_apart and settings.decoder_start_token_id is None:  # some models name it only here
        own = GenerationConfig.from_pretrained(base.name_or_path)
        settings.decoder_start_token_id = own.decoder_start_token_id
    return settings


def _name_base(folder: Path, base: str) -> None:
    """Make the adapter name its base model as it is found now: a run may have been moved together with it."""
    file = folder / "adapter_config.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": base})

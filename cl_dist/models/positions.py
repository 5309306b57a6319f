"""How long a loaded model's inputs may be, from its position tables and its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from cl_dist.models.position_settings import NAMES, Positions, configured_positions
from cl_dist.models.structure import base_model, unread_parameters

_TABLE = re.compile(r"position|(^|\.)(wpe|pos_emb|pos_embed|pos_embedding)s?$")
_NO_TABLE = re.compile(r"relative|(^|\.)[xyhw]_position")
"""Tables of distances between tokens, and of places on a page."""

SPARE_ROWS = 8
"""A table may have a few more rows than the configuration has positions, for padding or an offset."""


def longest_inputs(model: nn.Module) -> Positions:
    """Return how many tokens `model` (with or without adapters) has positions for, per half of an encoder-decoder.

    A position table is recognised by its name, or by having as many rows as the configuration has positions.
    """
    base = base_model(model)
    longest = configured_positions(base.config.to_dict())
    for name, table in _tables(base):
        rows = _usable_rows(base, name, table)
        if not base.config.is_encoder_decoder:
            longest = longest.smaller(Positions(source=rows))
            continue
        parts = name.split(".")
        longest = longest.smaller(Positions(None if "decoder" in parts else rows, None if "encoder" in parts else rows))
    return longest


def _tables(base: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield name and module of each position table that text passes through."""
    unread = unread_parameters(base)
    text = base_model(base).config.get_text_config()
    sizes = [size for name in NAMES if isinstance(size := getattr(text, name, None), int)]
    for name, module in base.named_modules():
        if not isinstance(module, nn.Embedding) or f"{name}.weight" in unread or _NO_TABLE.search(name):
            continue
        if _TABLE.search(name) or _is_of_that_size(module, sizes, base):
            yield name, module


def _is_of_that_size(module: nn.Embedding, sizes: list[int], base: nn.Module) -> bool:
    """Whether a table, whatever its name, has as many rows as the configuration has positions."""
    text = base_model(base)
    if module is text.get_input_embeddings() or module.num_embeddings == text.config.get_text_config().vocab_size:
        return False
    return any(0 <= module.num_embeddings - size <= SPARE_ROWS for size in sizes)


def _usable_rows(base: nn.Module, name: str, table: nn.Embedding) -> int:
    """Return how many rows of a table are positions of tokens."""
    # RoBERTa numbers positions from behind its padding row, OPT and BART from an offset.
    reserved = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    rows = int(table.num_embeddings) - (reserved if isinstance(reserved, int) else 0)
    # BERT and its relatives keep position ids in a buffer beside the table, possibly fewer than it has rows.
    ids = getattr(base.get_submodule(name.rpartition(".")[0]), "position_ids", None)
    return min(rows, int(ids.shape[-1])) if isinstance(ids, Tensor) else rows

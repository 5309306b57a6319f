"""How long a model's inputs may be according to its configuration; imports no torch.

Rotary, relative (T5) and ALiBi positions have no limit that would stop a run. Position tables do, whether learned
(BERT, GPT-2, OPT) or computed once for all positions (Pegasus, GPT-J, MPT).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
"""The settings under which configurations keep the number of positions."""

_NAMED = "max_position_embeddings"

TABLES: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt", "gptj", "codegen", "ctrl"), "n_positions"),
    "mpt": "max_seq_len",
    **dict.fromkeys(
        (
            "albert",
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "bigbird_pegasus",
            "biogpt",
            "blenderbot",
            "blenderbot-small",
            "camembert",
            "convbert",
            "data2vec-text",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "ernie",
            "flaubert",
            "fnet",
            "gpt_neo",
            "ibert",
            "longformer",
            "marian",
            "mbart",
            "megatron-bert",
            "mobilebert",
            "mpnet",
            "mvp",
            "nystromformer",
            "opt",
            "pegasus",
            "plbart",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "squeezebert",
            "xlm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
            "yoso",
        ),
        _NAMED,
    ),
}
"""Model types whose positions come from a table, each with the setting that holds the number of rows."""

AFTER_PADDING = frozenset(
    (
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    )
)
"""Model types that number positions from the padding token's id + 1: the rows before that are no positions."""

MPNET_RESERVED = 2
"""Unused rows of MPNet, which fixes its padding position at 1 whatever the tokenizer uses."""


@dataclass(frozen=True)
class Positions:
    """Largest number of tokens that a model can read or write; None: unlimited."""

    source: int | None = None
    """In the prompt; for a decoder in prompt and answer together."""
    target: int | None = None
    """In the answer of an encoder-decoder."""

    def smaller(self, other: Positions) -> Positions:
        """Return the tighter limit of each."""
        return Positions(_least((self.source, other.source)), _least((self.target, other.target)))


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def configured_positions(config: Mapping[str, Any]) -> Positions:
    """Read the limits from config.json (or a configuration as a mapping); an unknown model type has none."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return configured_positions(text)
    kind = str(config.get("model_type", ""))
    if kind == "led":
        prompt, answer = (_number(config, f"max_{half}_position_embeddings") for half in ("encoder", "decoder"))
        return Positions(prompt, answer)
    rows = _number(config, TABLES.get(kind, ""))
    if rows is None or (kind.startswith("deberta") and config.get("position_biased_input") is False):
        return Positions()
    longest = rows - _reserved(kind, config)
    return Positions(longest, longest if config.get("is_encoder_decoder") else None)


def _number(config: Mapping[str, Any], name: str) -> int | None:
    """Return a setting that is a positive integer; judging anything else is left to the model's own code."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _reserved(kind: str, config: Mapping[str, Any]) -> int:
    """Return how many rows of the table no token uses."""
    if kind == "mpnet":
        return MPNET_RESERVED
    padding = config.get("pad_token_id")
    return padding + 1 if kind in AFTER_PADDING and isinstance(padding, int) else 0

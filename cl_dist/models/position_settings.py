"""How long a model's inputs may be, as its configuration says; imports no torch.

Rotary, relative (T5) and ALiBi positions have no end that would stop a run. Tables have one: learnt ones (BERT, GPT-2,
OPT), and those that are computed once for all positions (Pegasus, GPT-J, MPT).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
"""What configurations call the number of positions."""

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
"""Model types whose positions come from a table, and the setting that says how many there are."""

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
"""Those that count positions from the padding token's id + 1 on: that many rows of the table are not positions."""

MPNET_RESERVED = 2
"""MPNet's padding position is 1 whatever the tokenizer says."""


@dataclass(frozen=True)
class Positions:
    """Most tokens that a model can read or write; None: no end."""

    source: int | None = None
    """In a prompt; for a decoder prompt and answer together."""
    target: int | None = None
    """In an encoder-decoder's answer."""

    def smaller(self, other: Positions) -> Positions:
        """The smaller of each."""
        return Positions(_least((self.source, other.source)), _least((self.target, other.target)))


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def configured_positions(config: Mapping[str, Any]) -> Positions:
    """What config.json, or a configuration as a mapping, says; an unknown model type says nothing."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return configured_positions(text)
    kind = str(config.get("model_type", ""))
    if kind == "led":
        rows, answer = (
            _number(config, "max_encoder_position_embeddings"),
            _number(config, "max_decoder_position_embeddings"),
        )
        return Positions(rows, answer)
    rows = _number(config, TABLES.get(kind, ""))
    if rows is None or (kind.startswith("deberta") and config.get("position_biased_input") is False):
        return Positions()
    longest = rows - _reserved(kind, config)
    return Positions(longest, longest if config.get("is_encoder_decoder") else None)


def _number(config: Mapping[str, Any], name: str) -> int | None:
    """A setting that is a number of positions; anything else is left to the model's own code."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _reserved(kind: str, config: Mapping[str, Any]) -> int:
    """Rows of a table that no token's position is."""
    if kind == "mpnet":
        return MPNET_RESERVED
    padding = config.get("pad_token_id")
    return padding + 1 if kind in AFTER_PADDING and isinstance(padding, int) else 0

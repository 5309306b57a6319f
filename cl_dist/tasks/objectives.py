"""What each training objective does to samples, batches and logits: one class each.

The facts that the rest of the project asks for are in `config/objectives.py`; a new objective is an entry there and a
class here. Torch is not imported, so that samples can be encoded without it: tensors bring their own methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cl_dist.config.objectives import FACTS, ObjectiveFacts, ObjectiveName
from cl_dist.tasks.types import IGNORE, Encoded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from cl_dist.tasks.collate import Batch


class Objective:
    """One objective. What is written here holds for most of them; the others override it."""

    def __init__(self, name: ObjectiveName) -> None:
        self.name = name
        self.facts: ObjectiveFacts = FACTS[name]

    # Samples

    def frame(self, prefix: list[int], suffix: list[int]) -> tuple[list[int], list[int]]:
        """The special tokens around a prompt or a chunk of text, given those that the tokenizer puts around a text."""
        return prefix, suffix

    def document_end(self, eos_id: int) -> list[int]:
        """What ends a document in a stream of text."""
        return []

    def sample(self, index: int, source: list[int], target: list[int]) -> Encoded:
        """A prompt and its answer as one sample; of a classifier `target` is the class."""
        return Encoded(index, source, target)

    def chunk(self, index: int, prefix: list[int], ids: list[int], suffix: list[int]) -> Encoded:
        """A chunk of text between special tokens, which are not learned."""
        return Encoded(index, prefix + ids + suffix, [IGNORE] * len(prefix) + ids + [IGNORE] * len(suffix))

    def made_up_labels(self, tokens: list[int], answer: list[int]) -> list[int]:
        """Labels for a sample made of arbitrary tokens and an arbitrary answer, as in a trial or a filler."""
        return [IGNORE, *tokens[1:]]

    def tokens(self, sample: Encoded) -> int:
        """Tokens that a sample sends through the model."""
        return len(sample.input_ids)

    # Batches

    def decoder_inputs(self, labels: Tensor, pad_id: int, start_id: int | None) -> dict[str, Tensor]:
        """What the model takes besides input_ids and attention_mask; `labels` are (B, T)."""
        return {}

    def batch_labels(self, labels: Tensor) -> Tensor:
        """A batch's labels from its samples' padded ones, (B, T)."""
        return labels

    def pose(self, batch: Batch, tokenizer: PreTrainedTokenizerBase, seed: int) -> Batch:
        """The batch as the model sees it, where that is drawn anew each time."""
        return batch

    # Logits

    def forward(self, run: Callable[..., Any], batch: Batch, keeps_logits: bool) -> tuple[Tensor, Tensor]:
        """Run the model; return logits and the labels that they are to predict.

        Args:
            run: The model's forward, or the engine's.
            batch: On the model's device.
            keeps_logits: Whether `run` can compute logits at chosen positions only (`logits_to_keep`).
        """
        return run(**batch.inputs).logits, batch.labels

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all positions, (B, T, vocabulary), and labels, (B, T), such that each predicts the one at its
        place.
        """
        return logits, labels


class CausalLM(Objective):
    """A decoder continues its prompt; position t predicts the token at t + 1."""

    def frame(self, prefix: list[int], suffix: list[int]) -> tuple[list[int], list[int]]:
        """An answer or the next document follows, so nothing ends the text."""
        return prefix, []

    def document_end(self, eos_id: int) -> list[int]:
        """The end-of-sequence token."""
        return [eos_id]

    def sample(self, index: int, source: list[int], target: list[int]) -> Encoded:
        """The answer follows its prompt, and only the answer is learned."""
        return Encoded(index, source + target, [IGNORE] * len(source) + target)

    def chunk(self, index: int, prefix: list[int], ids: list[int], suffix: list[int]) -> Encoded:
        """Nothing predicts the first token."""
        chunk = super().chunk(index, prefix, ids, suffix)
        chunk.labels[0] = IGNORE
        return chunk

    def forward(self, run: Callable[..., Any], batch: Batch, keeps_logits: bool) -> tuple[Tensor, Tensor]:
        """Logits at the positions that predict a target in some sample of the batch."""
        positions = predicting_positions(batch.labels)
        if keeps_logits:
            logits = run(**batch.inputs, logits_to_keep=positions).logits
        else:
            logits = run(**batch.inputs).logits[:, positions]
        return logits, batch.labels[:, positions + 1]

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted by one."""
        return logits[:, :-1], labels[:, 1:]


class Seq2SeqLM(Objective):
    """An encoder reads the prompt, a decoder writes the answer."""

    def made_up_labels(self, tokens: list[int], answer: list[int]) -> list[int]:
        """The answer's tokens."""
        return answer

    def tokens(self, sample: Encoded) -> int:
        """Those of the answer too."""
        return len(sample.input_ids) + len(sample.labels)

    def decoder_inputs(self, labels: Tensor, pad_id: int, start_id: int | None) -> dict[str, Tensor]:
        """The start token, then the answer without its last token, with padding for IGNORE: (B, T)."""
        if start_id is None:
            raise ValueError("seq2seq_lm needs decoder_start_id")
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = start_id
        return {"decoder_input_ids": shifted.masked_fill(shifted == IGNORE, pad_id)}


class Classification(Objective):
    """A head on the last token's or a pooled state has one output for each label of the stream."""

    def made_up_labels(self, tokens: list[int], answer: list[int]) -> list[int]:
        """The first class, which every head has."""
        return [0]

    def batch_labels(self, labels: Tensor) -> Tensor:
        """One class for each sample: (B,)."""
        return labels[:, 0]


class MaskedLM(Objective):
    """An encoder fills in tokens that are masked anew in every batch."""

    def pose(self, batch: Batch, tokenizer: PreTrainedTokenizerBase, seed: int) -> Batch:
        """Mask some of the tokens; see `mask_tokens`."""
        from cl_dist.tasks.collate import mask_tokens  # which imports torch

        return mask_tokens(batch, tokenizer, seed)


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "causal_lm": CausalLM("causal_lm"),
    "seq2seq_lm": Seq2SeqLM("seq2seq_lm"),
    "classification": Classification("classification"),
    "masked_lm": MaskedLM("masked_lm"),
}


def predicting_positions(labels: Tensor) -> Tensor:
    """Return the positions whose logits predict a target somewhere in a decoder's batch, `(kept,)` int64, never empty.

    Position t predicts the label at t + 1. Answers are short and prompts long, so the output head runs over a few
    positions instead of all.

    Args:
        labels: `(batch, length)` int64, not shifted.
    """
    positions = (labels[:, 1:] != IGNORE).any(dim=0).nonzero()[:, 0]
    return positions if len(positions) else positions.new_zeros(1)

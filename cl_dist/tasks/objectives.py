"""What each training objective does to samples, batches and logits: one class each.

The facts that the rest of the project needs are in `config/objectives.py`; a new objective needs an entry there and a
class here. This module only calls methods of tensors, so samples can be encoded without importing torch.
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
    """One objective. The methods here suit most objectives; subclasses override what differs."""

    def __init__(self, name: ObjectiveName) -> None:
        self.name = name
        self.facts: ObjectiveFacts = FACTS[name]

    # Samples

    def frame(self, prefix: list[int], suffix: list[int]) -> tuple[list[int], list[int]]:
        """The special tokens around a prompt or a chunk, given those that the tokenizer puts around a text."""
        return prefix, suffix

    def document_end(self, eos_id: int) -> list[int]:
        """Ids that end a document within a stream of text."""
        return []

    def sample(self, index: int, source: list[int], target: list[int]) -> Encoded:
        """A prompt and its answer as one sample. For a classifier, `target` is the class."""
        return Encoded(index, source, target)

    def chunk(self, index: int, prefix: list[int], ids: list[int], suffix: list[int]) -> Encoded:
        """A chunk of text between special tokens, which have no loss."""
        return Encoded(index, prefix + ids + suffix, [IGNORE] * len(prefix) + ids + [IGNORE] * len(suffix))

    def made_up_labels(self, tokens: list[int], answer: list[int]) -> list[int]:
        """Labels for a sample made of arbitrary tokens and an arbitrary answer, as in a trial or a filler."""
        return [IGNORE, *tokens[1:]]

    def tokens(self, inputs: int, labels: int) -> int:
        """Number of tokens that samples with so many input tokens and labels send through the model."""
        return inputs

    # Batches

    def decoder_inputs(self, labels: Tensor, pad_id: int, start_id: int | None) -> dict[str, Tensor]:
        """Inputs of the model besides input_ids and attention_mask; `labels` are (B, T)."""
        return {}

    def batch_labels(self, labels: Tensor) -> Tensor:
        """The batch's labels, from the padded labels of its samples, (B, T)."""
        return labels

    def pose(self, batch: Batch, tokenizer: PreTrainedTokenizerBase, seed: int) -> Batch:
        """The batch as the model sees it. Overridden if that is random."""
        return batch

    # Logits

    def forward(self, run: Callable[..., Any], batch: Batch, keeps_logits: bool) -> tuple[Tensor, Tensor]:
        """Run the model; return logits and the labels that they should predict.

        Args:
            run: The model's forward, or the engine's.
            batch: On the model's device.
            keeps_logits: Whether `run` can compute the logits of selected positions only (`logits_to_keep`).
        """
        return run(**batch.inputs).logits, batch.labels

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Align the logits of all positions, (B, T, vocabulary), with the labels, (B, T), that they predict."""
        return logits, labels


class CausalLM(Objective):
    """A decoder continues its prompt; position t predicts the token at t + 1."""

    def frame(self, prefix: list[int], suffix: list[int]) -> tuple[list[int], list[int]]:
        """No suffix, because an answer or the next document follows."""
        return prefix, []

    def document_end(self, eos_id: int) -> list[int]:
        """The end-of-sequence token."""
        return [eos_id]

    def sample(self, index: int, source: list[int], target: list[int]) -> Encoded:
        """The answer follows its prompt, and only the answer has a loss."""
        return Encoded(index, source + target, [IGNORE] * len(source) + target)

    def chunk(self, index: int, prefix: list[int], ids: list[int], suffix: list[int]) -> Encoded:
        """The first token has no loss, since nothing predicts it."""
        chunk = super().chunk(index, prefix, ids, suffix)
        chunk.labels[0] = IGNORE
        return chunk

    def forward(self, run: Callable[..., Any], batch: Batch, keeps_logits: bool) -> tuple[Tensor, Tensor]:
        """Only positions that predict a target in some sample of the batch."""
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

    def tokens(self, inputs: int, labels: int) -> int:
        """Includes the answers, which the decoder reads."""
        return inputs + labels

    def decoder_inputs(self, labels: Tensor, pad_id: int, start_id: int | None) -> dict[str, Tensor]:
        """The start token and the answer without its last token, with padding instead of IGNORE: (B, T)."""
        if start_id is None:
            raise ValueError("seq2seq_lm needs decoder_start_id")
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = start_id
        return {"decoder_input_ids": shifted.masked_fill(shifted == IGNORE, pad_id)}


class Classification(Objective):
    """A head on the last token's or a pooled state has one output per label of the stream."""

    def made_up_labels(self, tokens: list[int], answer: list[int]) -> list[int]:
        """The first class, which every head has."""
        return [0]

    def batch_labels(self, labels: Tensor) -> Tensor:
        """One class per sample: (B,)."""
        return labels[:, 0]


class MaskedLM(Objective):
    """An encoder fills in tokens that are masked anew in every batch."""

    def pose(self, batch: Batch, tokenizer: PreTrainedTokenizerBase, seed: int) -> Batch:
        """Mask some of the tokens; see `mask_tokens`."""
        from cl_dist.tasks.collate import mask_tokens  # imported late, because it imports torch

        return mask_tokens(batch, tokenizer, seed)


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "causal_lm": CausalLM("causal_lm"),
    "seq2seq_lm": Seq2SeqLM("seq2seq_lm"),
    "classification": Classification("classification"),
    "masked_lm": MaskedLM("masked_lm"),
}


def predicting_positions(labels: Tensor) -> Tensor:
    """Return the positions whose logits predict a target somewhere in a decoder's batch, `(kept,)` int64, never empty.

    Position t predicts the label at t + 1. Answers are short and prompts long, so the output head runs on a few
    positions only.

    Args:
        labels: `(batch, length)` int64, not shifted.
    """
    positions = (labels[:, 1:] != IGNORE).any(dim=0).nonzero()[:, 0]
    return positions if len(positions) else positions.new_zeros(1)

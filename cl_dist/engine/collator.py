"""How this run's samples become micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cl_dist.config.objectives import ObjectiveName
from cl_dist.tasks.collate import Batch, as_filler, collate
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.types import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Collates samples for one model.

    Args:
        objective: What the model is trained to do.
        tokenizer: For the mask token of a masked language model.
        pad_id: Token that fills batches up.
        decoder_start_id: What an encoder-decoder's decoder reads first.
    """

    def __init__(
        self, objective: ObjectiveName, tokenizer: PreTrainedTokenizerBase, pad_id: int, decoder_start_id: int | None
    ) -> None:
        self.objective = OBJECTIVES[objective]
        self._tokenizer, self._pad_id, self._decoder_start_id = tokenizer, pad_id, decoder_start_id

    def __call__(self, samples: Sequence[Encoded], mask_seed: int) -> Batch:
        """One micro-batch of `samples`; `mask_seed` decides what a masked language model is asked."""
        batch = collate(list(samples), self.objective.name, self._pad_id, decoder_start_id=self._decoder_start_id)
        return self.objective.pose(batch, self._tokenizer, mask_seed)

    def filler(self, like: Encoded) -> Batch:
        """A micro-batch without a target and as short as can be: of `like`'s first tokens."""
        ids = (like.input_ids * 2)[:2]  # two, because a decoder's first token predicts the second
        labels = self.objective.made_up_labels(ids, like.labels[:1])
        return self([as_filler(Encoded(like.index, ids, labels))], mask_seed=0)

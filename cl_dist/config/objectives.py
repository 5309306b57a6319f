"""What a model can be trained to do: the facts about each objective, one entry each. Imports no torch.

What an objective does to samples, batches and logits is a class in `tasks/objectives.py`. A new objective is an entry
here and a class there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ObjectiveName = Literal["causal_lm", "seq2seq_lm", "classification", "masked_lm"]
"""What a recipe says, and what a run stores."""
Family = Literal["decoder", "encoder", "encoder-decoder"]
TaskKind = Literal["classification", "generation", "text"]
Mode = Literal["likelihood", "generate", "perplexity"]
"""How a task is scored."""
AnswerPlace = Literal["behind prompt", "apart", "class"]
"""Where a sample's answer stands: in the sequence of its prompt, in a sequence of its own, or as the number of one of
the head's outputs."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveFacts:
    """What the rest of the project asks about an objective."""

    families: tuple[Family, ...]
    """The model families that can have it."""
    learns: tuple[TaskKind, ...]
    """The kinds of task that it can learn."""
    modes: tuple[Mode, ...]
    """The modes that its tasks can be scored in."""
    answer: AnswerPlace | None
    """None: its samples are text without prompts and answers."""
    needs_tokens: tuple[Literal["eos", "mask"], ...] = ()
    """Special tokens that the tokenizer must have besides one to pad with."""
    new_head: bool = False
    """Whether a pretrained model may lack the head, which is then drawn at random."""
    masked: bool = False
    """Whether what the model is asked is drawn anew for every batch."""
    auto_class: str
    """transformers' class that loads such a model."""
    peft_task: str | None
    """peft's `TaskType`; None: it has none."""

    @property
    def generates(self) -> bool:
        """Whether the answer is text that the model writes."""
        return self.answer in ("behind prompt", "apart")

    @property
    def answer_in_prompt(self) -> bool:
        """Whether prompt and answer share one sequence, and so `max_length`; chat templates need that, too."""
        return self.answer == "behind prompt"

    @property
    def answer_apart(self) -> bool:
        """Whether a decoder reads the answer apart from the prompt."""
        return self.answer == "apart"

    @property
    def needs_labels(self) -> bool:
        """Whether the model has a head with one output for each label of the stream."""
        return self.answer == "class"


FACTS: dict[ObjectiveName, ObjectiveFacts] = {
    "causal_lm": ObjectiveFacts(
        families=("decoder",),
        learns=("classification", "generation", "text"),
        modes=("likelihood", "generate", "perplexity"),
        answer="behind prompt",
        needs_tokens=("eos",),
        auto_class="AutoModelForCausalLM",
        peft_task="CAUSAL_LM",
    ),
    "seq2seq_lm": ObjectiveFacts(
        families=("encoder-decoder",),
        learns=("classification", "generation"),
        modes=("likelihood", "generate"),
        answer="apart",
        needs_tokens=("eos",),
        auto_class="AutoModelForSeq2SeqLM",
        peft_task="SEQ_2_SEQ_LM",
    ),
    "classification": ObjectiveFacts(
        families=("decoder", "encoder"),
        learns=("classification",),
        modes=("likelihood",),
        answer="class",
        new_head=True,
        auto_class="AutoModelForSequenceClassification",
        peft_task="SEQ_CLS",
    ),
    "masked_lm": ObjectiveFacts(
        families=("encoder",),
        learns=("text",),
        modes=("perplexity",),
        answer=None,
        needs_tokens=("mask",),
        new_head=True,
        masked=True,
        auto_class="AutoModelForMaskedLM",
        peft_task=None,  # the adapter's configuration names the model's class instead
    ),
}
"""The first objective that lists a family is what `objective: auto` means for it."""


def objectives_of(family: Family) -> tuple[ObjectiveName, ...]:
    """What a family can be trained to do; the first is what `objective: auto` means."""
    return tuple(name for name, facts in FACTS.items() if family in facts.families)

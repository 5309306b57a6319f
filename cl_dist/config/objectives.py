"""What a model can be trained to do: the facts about each objective. Imports no torch.

`tasks/objectives.py` has a class per objective for what it does to samples, batches and logits. A new objective needs
an entry here and a class there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ObjectiveName = Literal["causal_lm", "seq2seq_lm", "classification", "masked_lm"]
"""The names in recipes and run folders."""
Family = Literal["decoder", "encoder", "encoder-decoder"]
TaskKind = Literal["classification", "generation", "text"]
Mode = Literal["likelihood", "generate", "perplexity"]
"""How a task is scored."""
AnswerPlace = Literal["behind prompt", "apart", "class"]
"""Where a sample's answer is: in the same sequence as its prompt, in a separate one, or as the number of one of the
head's outputs."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveFacts:
    """What the rest of the project needs to know about an objective."""

    families: tuple[Family, ...]
    """Model families that can be trained with it."""
    learns: tuple[TaskKind, ...]
    """Kinds of task that it can learn."""
    modes: tuple[Mode, ...]
    """Modes in which its tasks can be scored."""
    answer: AnswerPlace | None
    """None: samples are plain text, without prompts and answers."""
    needs_tokens: tuple[Literal["eos", "mask"], ...] = ()
    """Special tokens that the tokenizer must have, besides a padding token."""
    new_head: bool = False
    """Whether a pretrained model may lack the head, which is then initialised at random."""
    masked: bool = False
    """Whether every batch masks other tokens."""
    auto_class: str
    """The class of transformers that loads such a model."""
    peft_task: str | None
    """The `TaskType` of peft; None if there is none."""

    @property
    def generates(self) -> bool:
        """Whether the model generates text as its answer."""
        return self.answer in ("behind prompt", "apart")

    @property
    def answer_in_prompt(self) -> bool:
        """Whether prompt and answer share one sequence, and therefore `max_length`. Chat templates need this."""
        return self.answer == "behind prompt"

    @property
    def answer_apart(self) -> bool:
        """Whether prompt and answer are separate sequences, of encoder and decoder."""
        return self.answer == "apart"

    @property
    def needs_labels(self) -> bool:
        """Whether the model has a head with one output per label of the stream."""
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
"""For a model family, `objective: auto` means the first objective that lists it."""


def objectives_of(family: Family) -> tuple[ObjectiveName, ...]:
    """The objectives that a family can be trained with; `objective: auto` means the first."""
    return tuple(name for name, facts in FACTS.items() if family in facts.families)

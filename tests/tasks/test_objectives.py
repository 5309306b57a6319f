"""The catalogue of objectives, and which logits predict which labels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.config.objectives import FACTS, Family, Mode, ObjectiveFacts, ObjectiveName, TaskKind, objectives_of
from cl_dist.config.schema import EvalConfig, TrainConfig
from cl_dist.engine.engine import loss_sum
from cl_dist.engine.trainer import Collator
from cl_dist.evaluation.modes import resolve_mode
from cl_dist.evaluation.scorers import LIKELIHOOD_SCORERS
from cl_dist.models.load import AUTO_CLASSES
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.objectives import OBJECTIVES, Objective, predicting_positions
from cl_dist.tasks.types import IGNORE, Encoded, Example, Task
from tests.tasks.tiny_tokenizers import EOS, PAD, characters, ids


def test_every_objective_has_its_facts_and_its_class() -> None:
    assert set(get_args(ObjectiveName)) == set(FACTS) == set(OBJECTIVES) == set(AUTO_CLASSES)
    assert all(objective.name == name and objective.facts is FACTS[name] for name, objective in OBJECTIVES.items())


def test_every_family_kind_of_task_and_mode_has_an_objective() -> None:
    assert {family for facts in FACTS.values() for family in facts.families} == set(get_args(Family))
    assert {kind for facts in FACTS.values() for kind in facts.learns} == set(get_args(TaskKind))
    assert {mode for facts in FACTS.values() for mode in facts.modes} == set(get_args(Mode))


def test_auto_means_the_first_objective_of_the_family() -> None:
    found = {family: objectives_of(family) for family in get_args(Family)}
    assert found == {
        "decoder": ("causal_lm", "classification"),
        "encoder": ("classification", "masked_lm"),
        "encoder-decoder": ("seq2seq_lm",),
    }


def test_labels_can_be_scored_wherever_the_mode_is_allowed() -> None:
    places = {facts.answer for facts in FACTS.values() if "likelihood" in facts.modes}
    assert places == set(LIKELIHOOD_SCORERS)


class Copying(Objective):
    """A toy: the answer is learned beside the prompt, of which it is told by a second input."""

    def decoder_inputs(self, labels: Any, pad_id: int, start_id: int | None) -> dict[str, Any]:
        return {"lengths": (labels != IGNORE).sum(1)}

    def forward(self, run: Callable[..., Any], batch: Any, keeps_logits: bool) -> tuple[Any, Any]:
        return run(**batch.inputs).logits[:, : batch.labels.shape[1]], batch.labels


def test_a_new_objective_is_an_entry_and_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    name: Any = "copying"
    facts = ObjectiveFacts(
        families=("encoder",), learns=("generation",), modes=("generate",), answer="apart", needs_tokens=("eos",),
        auto_class="AutoModel", peft_task=None,
    )  # fmt: skip
    monkeypatch.setitem(FACTS, name, facts)
    monkeypatch.setitem(OBJECTIVES, name, Copying(name))
    task = Task("t", "generation", [Example("Q:", "ab"), Example("QR:", "a")], [Example("Q:", "ab")])
    samples = Encoder(characters("$A"), name, TrainConfig(), ()).train(task)
    assert [(sample.input_ids, sample.labels) for sample in samples] == [
        (ids("Q:"), [*ids("ab"), EOS]),
        (ids("QR:"), [*ids("a"), EOS]),
    ]
    batch = Collator(name, characters("$A"), PAD, None)(samples, mask_seed=0)
    assert batch.inputs["lengths"].tolist() == [3, 2]
    assert set(batch.token_masks) == {"input", "target"}
    logits, labels = OBJECTIVES[name].forward(lambda **_: SimpleNamespace(logits=torch.ones(2, 9, 5)), batch, False)
    assert logits.shape[:2] == labels.shape == (2, 3)
    assert resolve_mode(task, name, EvalConfig()) == "generate"
    assert objectives_of("encoder")[-1] == "copying"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_filler_has_no_target_and_goes_through_the_model(name: ObjectiveName) -> None:
    like = Encoded(3, [7, 8, 9], {"classification": [1], "seq2seq_lm": [5, 6]}.get(name, [IGNORE, 8, 9]))
    batch = Collator(name, characters("$A"), PAD, 0).filler(like)
    assert batch.targets == batch.tokens == 0
    assert batch.inputs["input_ids"].shape == (1, 2)
    assert (batch.labels == IGNORE).all()


@given(rows=st.integers(1, 4), length=st.integers(2, 9), seed=st.integers(0, 100))
def test_chosen_positions_give_the_loss_of_all_positions(rows: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.7] = IGNORE
    expected = torch.zeros(())
    for row in range(rows):
        for position in range(1, length):
            if labels[row, position] != IGNORE:
                expected = expected - torch.log_softmax(logits[row, position - 1].float(), -1)[labels[row, position]]
    chosen = predicting_positions(labels)
    assert len(chosen) >= 1
    torch.testing.assert_close(loss_sum(logits[:, chosen], labels[:, chosen + 1]), expected)
    torch.testing.assert_close(loss_sum(*OBJECTIVES["causal_lm"].aligned(logits, labels)), expected)


def test_a_batch_of_fillers_costs_one_position_and_nothing_else() -> None:
    labels = torch.full((2, 6), IGNORE)
    chosen = predicting_positions(labels)
    assert chosen.tolist() == [0]
    assert loss_sum(torch.randn(2, 1, 5), labels[:, chosen + 1]).item() == 0.0

"""Several methods as one: each of them gets every moment, in the recipe's order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_dist.errors import ClDistError
from cl_dist.methods.composed import Composed
from cl_dist.methods.protocol import Memory, Method
from cl_dist.methods.rehearsal import Rehearsed
from cl_dist.sharding import Shard
from cl_dist.tasks.types import Encoded

CALLS: list[str] = []


class Noted(Method):
    """Records every call, and returns the answers that it was created with."""

    def __init__(self, name: str, **answers: Any) -> None:
        super().__init__()
        self.name, self.answers = name, answers

    def note(self, moment: str) -> Any:
        CALLS.append(f"{self.name}.{moment}")
        return self.answers.get(moment)

    def prepare_task(self, index: int) -> bool:
        return bool(self.note("prepare_task"))

    def memory(self, index: int, tasks: Any) -> Memory | None:
        found: Memory | None = self.note("memory")
        return found

    def trains(self, index: int) -> bool:
        return bool(self.note("trains"))

    def training_data(self, index: int, tasks: Any) -> Any:
        return self.note("training_data")

    def start_message(self) -> str | None:
        return f"{self.name} says" if self.note("start_message") else None

    def added_loss(self, batch: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        found: torch.Tensor | None = self.note("added_loss")
        return found

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * 2 + self.answers["before_backward"]

    def state_dict(self) -> dict[str, Any]:
        return {"of": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.note(f"loaded {state['of']}")

    def tensors(self) -> dict[str, dict[str, Shard]]:
        return {"held": {"weight": Shard(0, torch.zeros(1))}}

    def before_update(self) -> None:
        self.note("before_update")


def test_every_moment_is_passed_on() -> None:
    moments = {name for name, value in vars(Method).items() if callable(value) and not name.startswith("_")}
    assert len(moments) > 20
    assert moments - set(vars(Composed)) == {"Config"}


def test_the_order_is_that_of_the_list() -> None:
    CALLS.clear()
    composed = Composed([Noted("a"), Noted("b")])
    composed.before_update()
    assert CALLS == ["a.before_update", "b.before_update"]
    one, other = (Noted(name, before_backward=value) for name, value in (("a", 1.0), ("b", 5.0)))
    assert Composed([one, other]).before_backward(torch.tensor(1.0)).item() == 11.0
    assert Composed([other, one]).before_backward(torch.tensor(1.0)).item() == 15.0


def test_all_methods_prepare_and_one_is_enough_to_rebuild_the_engine() -> None:
    CALLS.clear()
    assert Composed([Noted("a", prepare_task=True), Noted("b", prepare_task=False)]).prepare_task(1) is True
    assert CALLS == ["a.prepare_task", "b.prepare_task"]
    assert Composed([Noted("a"), Noted("b")]).prepare_task(1) is False


def test_answers_are_combined() -> None:
    x, y, z = (Encoded(index, [index], [index]) for index in range(3))
    memories = [Memory([], inner, 1) for inner in (3, 4)]
    loss = torch.tensor(0.5)
    first = Noted("a", trains=True, training_data=[x], added_loss=None, start_message=None)
    second = Noted("b", trains=True, training_data=[y], memory=memories[0], added_loss=loss, start_message=True)
    third = Noted("c", trains=False, training_data=[z], memory=memories[1], added_loss=loss, start_message=True)
    composed, nothing = Composed([first, second, third]), torch.zeros(1)
    batch: Any = None
    assert composed.training_data(1, []) == [x, y, z]
    assert composed.memory(1, []) is memories[0]
    assert (composed.trains(1), Composed([first, second]).trains(1)) == (False, True)
    assert composed.added_loss(batch, nothing, nothing) == torch.tensor(1.0)
    assert Composed([first]).added_loss(batch, nothing, nothing) is None
    assert composed.start_message() == "b says\nc says"
    assert Composed([first]).start_message() is None


def test_states_are_identified_by_position() -> None:
    """Saved states of earlier releases have this form."""
    CALLS.clear()
    composed = Composed([Noted("a"), Noted("b")])
    assert list(composed.tensors()) == ["method0.held", "method1.held"]
    assert composed.state_dict() == {"methods": [{"of": "a"}, {"of": "b"}]}
    composed.load_state_dict({"step": 3, **composed.state_dict()})
    assert CALLS == ["a.loaded a", "b.loaded b"]


@pytest.mark.parametrize(
    ("moment", "arguments", "answer", "message"),
    [
        ("trains", (0,), None, "its trains returned null of type NoneType; allowed: bool"),
        ("prepare_task", (0,), None, "its prepare_task returned null .* allowed: bool"),
        ("training_data", (0, ()), None, "its training_data returned null .* allowed: Sequence"),
        ("training_data", (0, ()), [3], "its training_data returned 3 of type int; allowed: Encoded"),
        ("memory", (0, ()), 3, "its memory returned 3 of type int; allowed: Memory or None"),
        ("before_backward", (torch.zeros(()),), None, "its before_backward returned null .* allowed: Tensor"),
        ("added_loss", (None, None, None), 3, "its added_loss returned 3 of type int; allowed: Tensor or None"),
        ("start_message", (), 3, "its start_message returned 3 of type int; allowed: str or None"),
        ("state_dict", (), None, "its state_dict returned null .* allowed: dict"),
        ("state_dict", (), {"a": float("nan")}, "its state_dict cannot be stored as JSON"),
        ("state_dict", (), {"a": torch.zeros(1)}, "its state_dict cannot be stored as JSON"),
        ("tensors", (), {"a": {"w": torch.zeros(1)}}, "its tensors returned .* of type Tensor; allowed: Shard"),
    ],
)
def test_an_answer_of_the_wrong_type_is_refused(moment: str, arguments: Any, answer: Any, message: str) -> None:
    careless = type("Careless", (Method,), {moment: lambda self, *given: answer})
    with pytest.raises(ClDistError, match=f"^method Careless: {message}"):
        getattr(Composed([careless()]), moment)(*arguments)


def test_what_the_methods_find_in_a_dry_run_is_put_together() -> None:
    class Rehearsing(Noted):
        def rehearse(self, rehearsal: Any) -> Rehearsed:
            return Rehearsed(notes=(f"{self.name} notes",), problems=(f"{self.name} fails",))

    found = Composed([Rehearsing("a"), Noted("b"), Rehearsing("c")]).rehearse(None)  # type: ignore[arg-type]
    assert found == Rehearsed(("a notes", "c notes"), ("a fails", "c fails"))

"""Several methods as one: every moment goes to each of them, in the order in which the recipe lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar

from cl_dist.config.words import show
from cl_dist.errors import ClDistError
from cl_dist.methods.catalogue import method_class
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.protocol import Memory, Method, TaskPlace
from cl_dist.tasks.types import Encoded

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cl_dist.config.schema import TrainConfig
    from cl_dist.sharding import Shard, ShardView
    from cl_dist.tasks.collate import Batch


def compose(configs: Sequence[MethodConfig]) -> Composed:
    """The methods of a recipe."""
    return Composed([_build(config) for config in configs])


def _build(config: MethodConfig) -> Method:
    cls = method_class(config.name)
    assert cls is not None, f"{config.name} was there when the recipe was read"
    method: Method = cls(config)
    return method


Answer = TypeVar("Answer")


def _answered(method: Method, moment: str, answer: Answer, *kinds: type) -> Answer:
    """What a method answered in a moment, where it is of a type that the protocol allows: a plugin may forget a
    `return`. Raises ClDistError.
    """
    if not isinstance(answer, kinds):
        allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ClDistError(
            f"method {_name(method)}: its {moment} returned {show(answer)} of "
            f"type {type(answer).__name__}; allowed: {allowed}"
        )
    return answer


def _name(method: Method) -> str:
    return str(getattr(method.config, "name", type(method).__name__))


def _json_state(method: Method) -> dict[str, Any]:
    """A method's state, once it is known to be JSON."""
    state = _answered(method, "state_dict", method.state_dict(), dict)
    try:
        json.dumps(state, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ClDistError(f"method {_name(method)}: its state_dict cannot be kept as JSON: {error}") from error
    return state


def _shards_of(method: Method) -> dict[str, dict[str, Shard]]:
    """A method's tensors, by quantity and parameter."""
    from cl_dist.sharding import Shard  # which imports torch

    found = _answered(method, "tensors", method.tensors(), dict)
    for shards in found.values():
        for shard in _answered(method, "tensors", shards, dict).values():
            _answered(method, "tensors", shard, Shard)
    return found


class Composed(Method):
    """Methods that act one after the other. Which ones go together is checked with the recipe (`check_methods`).

    Args:
        methods: In the order in which they act.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__()
        self.methods = tuple(methods)
        self.needs_all_logits = any(method.needs_all_logits for method in methods)
        self.keeps_unfused = any(method.keeps_unfused for method in methods)

    def follow(self, task: str) -> None:
        """See `Method`."""
        for method in self.methods:
            method.follow(task)

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """See `Method`."""
        for method in self.methods:
            method.attach(model, shards, train)

    def before_trial(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """See `Method`."""
        for method in self.methods:
            method.before_trial(token_masks)

    def after_trials(self, idle: Set[str]) -> None:
        """See `Method`."""
        for method in self.methods:
            method.after_trials(idle)

    def start_message(self) -> str | None:
        """A line for each method that has something to say."""
        answers = [_answered(each, "start_message", each.start_message(), str, type(None)) for each in self.methods]
        lines = [text for text in answers if text]
        return "\n".join(lines) or None

    def detach(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.detach()

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """What all methods add, one after the other."""
        return [
            _answered(method, "training_data", sample, Encoded)
            for method in self.methods
            for sample in _answered(method, "training_data", method.training_data(index, tasks), Sequence)
        ]

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """That of the first method that has one."""
        kinds = (Memory, type(None))
        memories = (_answered(method, "memory", method.memory(index, tasks), *kinds) for method in self.methods)
        return next((memory for memory in memories if memory is not None), None)

    def trains(self, index: int) -> bool:
        """Whether no method is against it."""
        return all(_answered(method, "trains", method.trains(index), bool) for method in self.methods)

    def prepare_task(self, index: int) -> bool:
        """Whether any method has changed what is trained."""
        # Each prepares, whatever the others say.
        changed = [_answered(method, "prepare_task", method.prepare_task(index), bool) for method in self.methods]
        return any(changed)

    def before_task(self, place: TaskPlace) -> None:
        """See `Method`."""
        for method in self.methods:
            method.before_task(place)

    def before_step(self, step: int) -> None:
        """See `Method`."""
        for method in self.methods:
            method.before_step(step)

    def before_forward(self, step: int, batch: Batch) -> None:
        """See `Method`."""
        for method in self.methods:
            method.before_forward(step, batch)

    def added_loss(self, batch: Batch, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """The sum of the losses that methods add."""
        from torch import Tensor

        total = None
        for method in self.methods:
            added = method.added_loss(batch, logits, labels)
            _answered(method, "added_loss", added, Tensor, type(None))
            if added is not None:
                total = added if total is None else total + added
        return total

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as each method leaves it to the next."""
        from torch import Tensor

        for method in self.methods:
            loss = _answered(method, "before_backward", method.before_backward(loss), Tensor)
        return loss

    def before_update(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.before_update()

    def after_update(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.after_update()

    def update_skipped(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.update_skipped()

    def after_task(self, place: TaskPlace) -> None:
        """See `Method`."""
        for method in self.methods:
            method.after_task(place)

    def write_results(self, folder: Path) -> None:
        """See `Method`."""
        for method in self.methods:
            method.write_results(folder)

    def before_save(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.before_save()

    def state_dict(self) -> dict[str, Any]:
        """`methods`: each method's state, in their order."""
        return {"methods": [_json_state(method) for method in self.methods]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each method its state back."""
        for method, own in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(own)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """All methods' tensors; quantities are numbered by the method's place: `method0.fisher`."""
        return {
            f"method{number}.{quantity}": shards
            for number, method in enumerate(self.methods)
            for quantity, shards in _shards_of(method).items()
        }

    def tensors_loaded(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.tensors_loaded()

"""Several methods as one: every moment goes to each of them, in the order in which the recipe lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from cl_dist.methods.catalogue import method_class
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.protocol import Memory, Method, TaskPlace

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from cl_dist.config.schema import TrainConfig
    from cl_dist.sharding import Shard, ShardView
    from cl_dist.tasks.collate import Batch
    from cl_dist.tasks.types import Encoded


def compose(configs: Sequence[MethodConfig]) -> Composed:
    """The methods of a recipe."""
    return Composed([_build(config) for config in configs])


def _build(config: MethodConfig) -> Method:
    cls = method_class(config.name)
    assert cls is not None, f"{config.name} was there when the recipe was read"
    method: Method = cls(config)
    return method


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
        lines = [text for method in self.methods if (text := method.start_message())]
        return "\n".join(lines) or None

    def detach(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.detach()

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> list[Encoded]:
        """What all methods add, one after the other."""
        return [sample for method in self.methods for sample in method.training_data(index, tasks)]

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """That of the first method that has one."""
        memories = (method.memory(index, tasks) for method in self.methods)
        return next((memory for memory in memories if memory is not None), None)

    def trains(self, index: int) -> bool:
        """Whether no method is against it."""
        return all(method.trains(index) for method in self.methods)

    def prepare_task(self, index: int) -> bool:
        """Whether any method has changed what is trained."""
        changed = [method.prepare_task(index) for method in self.methods]  # each prepares, whatever the others say
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
        total = None
        for method in self.methods:
            added = method.added_loss(batch, logits, labels)
            if added is not None:
                total = added if total is None else total + added
        return total

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as each method leaves it to the next."""
        for method in self.methods:
            loss = method.before_backward(loss)
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
        return {"methods": [method.state_dict() for method in self.methods]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each method its state back."""
        for method, own in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(own)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """All methods' tensors; quantities are numbered by the method's place: `method0.fisher`."""
        return {
            f"method{number}.{quantity}": shards
            for number, method in enumerate(self.methods)
            for quantity, shards in method.tensors().items()
        }

    def tensors_loaded(self) -> None:
        """See `Method`."""
        for method in self.methods:
            method.tensors_loaded()

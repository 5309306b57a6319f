"""Several methods as one: every moment goes to each of them, in the recipe's order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from cl_dist.config.words import show
from cl_dist.errors import ClDistError
from cl_dist.methods.catalogue import method_class
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.cost import Cost
from cl_dist.methods.protocol import Memory, Method
from cl_dist.methods.rehearsal import Rehearsed
from cl_dist.tasks.types import Encoded

if TYPE_CHECKING:
    import torch

    from cl_dist.methods.cost import RankShare
    from cl_dist.methods.rehearsal import Rehearsal
    from cl_dist.sharding import Shard
    from cl_dist.tasks.collate import Batch

Arguments = ParamSpec("Arguments")


def compose(configs: Sequence[MethodConfig]) -> Composed:
    """Build a recipe's methods."""
    methods: list[Method] = []
    for config in configs:
        cls = method_class(config.name)
        assert cls is not None, f"{config.name} was there when the recipe was read"
        methods.append(cls(config))
    return Composed(methods)


def _pass_on(
    moment: Callable[Concatenate[Method, Arguments], None],
) -> Callable[Concatenate[Composed, Arguments], None]:
    """A moment of `Composed` that calls the same moment of each method."""

    @wraps(moment)
    def call_each(self: Composed, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        for method in self.methods:
            getattr(method, moment.__name__)(*args, **kwargs)

    return call_each


Answer = TypeVar("Answer")


def _answered(method: Method, moment: str, answer: Answer, *kinds: type) -> Answer:
    """Return `answer`, or raise ClDistError if its type is not allowed: a plugin may forget a `return`."""
    if not isinstance(answer, kinds):
        allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ClDistError(
            f"method {_name(method)}: its {moment} returned {show(answer)} of "
            f"type {type(answer).__name__}; allowed: {allowed}"
        )
    return answer


def _name(method: Method) -> str:
    return str(getattr(method.config, "name", type(method).__name__))


def _quantity(number: int, name: str) -> str:
    """A quantity of the method at a position, as it is called in a saved state."""
    return f"method{number}.{name}"


def _json_state(method: Method) -> dict[str, Any]:
    """Return a method's state. Raises ClDistError if it is not JSON."""
    state = _answered(method, "state_dict", method.state_dict(), dict)
    try:
        json.dumps(state, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ClDistError(f"method {_name(method)}: its state_dict cannot be stored as JSON: {error}") from error
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
    """Methods that act one after the other. `check_methods` has checked with the recipe that they compose.

    Args:
        methods: In the order in which they act.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__()
        self.methods = tuple(methods)
        self.needs_all_logits = any(method.needs_all_logits for method in methods)
        self.keeps_unfused = any(method.keeps_unfused for method in methods)
        self.later_tensors = frozenset(
            _quantity(number, name) for number, method in enumerate(methods) for name in method.later_tensors
        )

    # Most moments return nothing: each method gets them in turn.
    follow = _pass_on(Method.follow)
    attach = _pass_on(Method.attach)
    before_trial = _pass_on(Method.before_trial)
    after_trials = _pass_on(Method.after_trials)
    detach = _pass_on(Method.detach)
    before_task = _pass_on(Method.before_task)
    before_step = _pass_on(Method.before_step)
    before_forward = _pass_on(Method.before_forward)
    before_update = _pass_on(Method.before_update)
    after_update = _pass_on(Method.after_update)
    update_skipped = _pass_on(Method.update_skipped)
    after_task = _pass_on(Method.after_task)
    write_results = _pass_on(Method.write_results)
    before_save = _pass_on(Method.before_save)
    tensors_loaded = _pass_on(Method.tensors_loaded)

    # The others have an answer, made of the methods' answers.

    def prepare_model(self, model: torch.nn.Module, seed: int) -> None:
        """Let each method prepare the model, which may decide what it needs."""
        for method in self.methods:
            method.prepare_model(model, seed)
        self.needs_all_logits = any(method.needs_all_logits for method in self.methods)

    def cost(self, share: RankShare) -> Cost:
        """What all methods add together."""
        return Cost.total(_answered(method, "cost", method.cost(share), Cost) for method in self.methods)

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """What all methods find."""
        found = Rehearsed()
        for method in self.methods:
            found += _answered(method, "rehearse", method.rehearse(rehearsal), Rehearsed)
        return found

    def start_message(self) -> str | None:
        """One line from each method that has a message."""
        answers = [_answered(each, "start_message", each.start_message(), str, type(None)) for each in self.methods]
        lines = [text for text in answers if text]
        return "\n".join(lines) or None

    def training_data(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Sequence[Encoded]:
        """All methods' additional samples, in order."""
        from cl_dist.tasks.samples import Samples, join  # imported late, because it imports NumPy

        parts = []
        for method in self.methods:
            part = _answered(method, "training_data", method.training_data(index, tasks), Sequence)
            for sample in () if isinstance(part, Samples) else part:
                _answered(method, "training_data", sample, Encoded)
            parts.append(part)
        return join(parts)

    def memory(self, index: int, tasks: Sequence[Sequence[Encoded]]) -> Memory | None:
        """The memory of the first method that has one."""
        kinds = (Memory, type(None))
        memories = (_answered(method, "memory", method.memory(index, tasks), *kinds) for method in self.methods)
        return next((memory for memory in memories if memory is not None), None)

    def trains(self, index: int) -> bool:
        """False if any method says that the task has no steps."""
        return all(_answered(method, "trains", method.trains(index), bool) for method in self.methods)

    def kept_share(self) -> float | None:
        """That of the method which chooses; no two do."""
        shares = [_answered(method, "kept_share", method.kept_share(), float, type(None)) for method in self.methods]
        known = [share for share in shares if share is not None]
        return min(known) if len(known) == len(shares) else None

    def prepare_task(self, index: int) -> bool:
        """Prepare every method; return whether any of them has changed what is trained."""
        # A list, so that no method is left out.
        changed = [_answered(method, "prepare_task", method.prepare_task(index), bool) for method in self.methods]
        return any(changed)

    def added_loss(self, batch: Batch, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """The sum of the methods' losses."""
        from torch import Tensor

        total = None
        for method in self.methods:
            added = method.added_loss(batch, logits, labels)
            _answered(method, "added_loss", added, Tensor, type(None))
            if added is not None:
                total = added if total is None else total + added
        return total

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Each method changes the loss that the one before it returned."""
        from torch import Tensor

        for method in self.methods:
            loss = _answered(method, "before_backward", method.before_backward(loss), Tensor)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """`methods`: each method's state, in order."""
        return {"methods": [_json_state(method) for method in self.methods]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore each method's own state."""
        for method, own in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(own)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """All methods' tensors; each quantity is prefixed with its method's position: `method0.fisher`."""
        return {
            _quantity(number, quantity): shards
            for number, method in enumerate(self.methods)
            for quantity, shards in _shards_of(method).items()
        }

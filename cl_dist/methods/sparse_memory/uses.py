"""How often the rows of embedding tables are looked up: by the tokens of a step, and in samples of other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cl_dist.config.words import listed
from cl_dist.errors import BadInput, ClDistError
from cl_dist.methods.shared.token_axes import Call, Trial, calls_of, counted
from cl_dist.models.structure import base_model, whole_shape

if TYPE_CHECKING:
    from cl_dist.methods.protocol import Probe
    from cl_dist.tasks.types import Encoded

SHOWN = 12
"""Most names in a message."""
Tables = Mapping[str, Mapping[str, nn.Embedding]]
"""By name of the parameter, the modules that look up its rows, by name."""


def embedding_tables(model: nn.Module, wanted: str | Sequence[str]) -> Tables:
    """The trainable embedding tables that `method.parameters` names, in model order.

    Raises:
        BadInput: A pattern matches none, or a module does not look up what it is called with.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, dict[str, nn.Embedding]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in names:
            found.setdefault(names[id(module.weight)], {})[name] = module
    inputs: Any = base_model(model).get_input_embeddings()
    patterns = [names.get(id(getattr(inputs, "weight", None)), "")] if isinstance(wanted, str) else wanted
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            known = listed(list(found), SHOWN) or "none"
            raise BadInput(
                f"method.parameters: {pattern or wanted} matches no trainable embedding table; the model has {known}"
            )
    chosen = {name: found[name] for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for modules in chosen.values():
        for name, module in modules.items():
            if type(module).forward is not nn.Embedding.forward and module is not inputs:
                raise BadInput(
                    f"method.parameters: {name} ({type(module).__name__}) looks up other rows than it is called with; "
                    "allowed: tables of tokens"
                )
    return chosen


class TableUses:
    """Hooks on embedding modules that count which rows the real tokens of training look up.

    Args:
        tables: The tables.
        device: Where their indices are.
    """

    def __init__(self, tables: Tables, device: torch.device) -> None:
        self.rows = {name: whole_shape(next(iter(modules.values())).weight)[0] for name, modules in tables.items()}
        """Rows of each table, by name."""
        self._flat = torch.zeros(sum(self.rows.values()), dtype=torch.int64, device=device)
        self._plan: dict[str, tuple[Call, ...]] = {}
        self._trials: list[tuple[Mapping[str, torch.Tensor], dict[str, list[torch.Size | None]]]] = []
        self._masks: Mapping[str, torch.Tensor] = {}
        self._place: dict[str, int] = {}
        self._learning = self._alone = False
        by_table = self.by_table(self._flat)
        self._owners = {name: table for table, modules in tables.items() for name in modules}
        self._handles = [
            module.register_forward_pre_hook(self._hook(name, by_table[table]), with_kwargs=True)
            for table, modules in tables.items()
            for name, module in modules.items()
        ]

    def by_table(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut a number for every row of all tables into views by table."""
        return dict(zip(self.rows, flat.split(list(self.rows.values())), strict=True))

    def learn(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A trial forward pass starts now: record the shapes of the indices."""
        self._learning = True
        self._trials.append((token_masks, {name: [] for name in self._owners}))

    def learnt(self) -> None:
        """The trials are over. Raises BadInput if a table is not looked up by tokens."""
        self._learning = False
        for name, table in self._owners.items():
            trials = [Trial(shapes[name], masks) for masks, shapes in self._trials]
            if not any(trial.shapes for trial in trials):
                continue  # T5's modules that read its table are others than the one that the table is named after
            calls = calls_of(trials)
            if isinstance(calls, str) or any(call.form == "table" for call in calls):
                reason = calls if isinstance(calls, str) else "its rows do not belong to tokens"
                raise BadInput(
                    f"method.parameters: uses of {table} cannot be counted: {reason}; allowed: tables of tokens"
                )
            self._plan[name] = calls
        self._trials.clear()
        read = {self._owners[name] for name in self._plan}
        if idle := [table for table in self.rows if table not in read]:
            raise BadInput(f"method.parameters: {idle[0]} is not looked up; allowed: tables of tokens")

    def begin(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A training forward pass starts now. `token_masks` marks its real tokens, as in `Batch.token_masks`."""
        self._masks, self._place = token_masks, dict.fromkeys(self._owners, 0)

    def total(self) -> torch.Tensor:
        """Uses of every row since `clear`, over all ranks, `(rows of all tables,)` int64 (collective)."""
        total = self._flat.clone()
        torch.distributed.all_reduce(total)
        return total

    def clear(self) -> None:
        """Begin a new step."""
        self._flat.zero_()

    def background(self, samples: Sequence[Encoded], probe: Probe) -> torch.Tensor:
        """In how many of the samples each row is used, `(rows of all tables,)` int64 (collective)."""
        found, rank = torch.zeros_like(self._flat), torch.distributed.get_rank()

        def take(number: int) -> None:
            if rank < number:
                found.add_(self._flat > 0)
            self.clear()

        self._alone = True
        try:
            self.clear()
            probe.each(samples, take)
        finally:
            self._alone = False
        torch.distributed.all_reduce(found)
        return found

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, counts: torch.Tensor) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            indices = args[0] if args else next(iter(kwargs.values()))
            if torch._C._current_graph_task_id() != -1:  # recomputed in backward: counted already
                return
            if self._learning:
                self._trials[-1][1][name].append(indices.shape)
            elif self._alone:
                counts.add_(torch.bincount(indices.reshape(-1), minlength=len(counts)))
            elif module.training and self._plan:
                real = self._real(name, indices.shape).expand(indices.shape)
                counts.add_(torch.bincount(indices[real], minlength=len(counts)))

        return see

    def _real(self, name: str, shape: torch.Size) -> torch.Tensor:
        place = self._place[name]
        if place >= len(self._plan.get(name, ())):
            raise ClDistError(f"table {name} is used more often in a forward pass than it was before training")
        self._place[name] += 1
        return counted(self._plan[name][place], shape, self._masks, name)

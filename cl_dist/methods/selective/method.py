"""The base of methods that choose once per task which part of the weights is trained, before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.kept_parts import KeptPart, Part, install, is_kept
from cl_dist.models.structure import is_sharded, whole_shape
from cl_dist.sharding import Shard, ShardView, whole_parameters
from cl_dist.sharding.maps import even_share


class Selective(Method):
    """Trains parts of weights as parameters of their own (`models/kept_parts.py`); the rest has no gradient at all.

    Override `parts`, which says how much of each weight is trained, and `choose`, which says what; or `frozen`, for
    whole parameters. The choice of parts is in the saved state; frozen parameters have to follow from seed and task.
    """

    trains_bias = True
    """Whether a layer of which rows are trained trains the same rows of its bias."""

    def parts(self, model: nn.Module) -> Sequence[Part]:
        """The weights of which a part is trained. The same in every task.

        Raises:
            BadInput: The method cannot train this model.
        """
        return ()

    def frozen(self, model: nn.Module, task: int) -> Set[str]:
        """Names of the parameters, trainable when the run begins, that task `task` (0-based) does not train at all."""
        return frozenset()

    def choose(self, place: TaskPlace) -> Mapping[str, torch.Tensor]:
        """Choose a task's rows, columns or elements, before its first step, the same on all ranks.

        `self.model` computes with the weights that the task starts from, and `place.probe` can measure it.

        Returns:
            By weight name `(Part.count,)` integers, strictly ascending.
        """
        return {}

    def trains_rest(self, name: str) -> bool:
        """Whether a parameter that is trainable and has no `Part` is trained as a whole."""
        return True

    def prepare_model(self, model: nn.Module, seed: int) -> None:
        """Freeze the weights, and put their trained parts beside them."""
        self.seed = seed
        self._trainable = sum(whole_shape(each).numel() for each in model.parameters() if each.requires_grad)
        parts = self.parts(model)
        whole = {part.weight for part in parts}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in whole and not self.trains_rest(name):
                parameter.requires_grad_(False)
        self._parts: list[KeptPart] = install(model, parts, self.trains_bias)
        # Parameters that are trained as a whole, in all tasks together.
        self.whole = [name for name, each in model.named_parameters() if each.requires_grad and not is_kept(name)]
        self.model = model
        self.prepare_task(0)

    def cost(self, share: RankShare) -> Cost:
        """The weights that a task does not train are saved with its state, by every rank an even share."""
        names = [*self._frozen, *self._resting]
        frozen = sum(whole_shape(self.model.get_parameter(name)).numel() for name in names) * share.itemsize
        numbers = sum(part.indices.nbytes for part in self._elements)
        saved = frozen + numbers
        return Cost(
            device={f"{self.config.name}'s elements": numbers} if numbers else {},
            saved=saved if share.replicated else saved // share.world,
        )

    def attach(self, model: nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Remember the model and its shards."""
        self.shards = shards
        self._pending = False
        shards.on_publish(self._overlay)  # other methods put weights back too

    def prepare_task(self, index: int) -> bool:
        """Freeze the whole parameters that the task does not train, and thaw the others."""
        frozen = self.frozen(self.model, index)
        trained = {name: name not in frozen for name in self.whole}
        parameters = {name: self.model.get_parameter(name) for name in self.whole}
        changed = any(parameters[name].requires_grad != trains for name, trains in trained.items())
        for name, trains in trained.items():
            parameters[name].requires_grad_(trains)
        return changed

    def before_task(self, place: TaskPlace) -> None:
        """The choice is due, unless a saved state brings it."""
        self._place, self._pending = place, True
        self._activate(False)

    def before_step(self, step: int) -> None:
        """Choose the parts of a new task; here, because a resume restores its state after `before_task`."""
        if self._pending:
            self._pending = False
            self._set(self._agreed(self.choose(self._place)))
            self._take_values()
            self._activate(True)

    def after_update(self) -> None:
        """Compute with the new values from now on."""
        self._overlay()

    def after_task(self, place: TaskPlace) -> None:
        """Give the weights their trained values for good."""
        if not self._sharded:
            return  # they have them
        shares = self.shards.frozen(self._frozen)
        for kept, name, axis, part in self._names():
            [values] = [whole.clone() for whole in whole_parameters(self.model, [kept])]
            for whole in whole_parameters(self.model, [name]):
                if (share := shares.get(name)) is not None:
                    updated = part.by_unit(whole).index_copy(axis, part.indices.long(), values).reshape(-1)
                    share.data.copy_(updated[share.start : share.stop])
        self.shards.publish_frozen(self._frozen)

    def kept_share(self) -> float:
        """The parts, and what is trained as a whole."""
        return sum(map(self.shards.numel, self.shards.names)) / self._trainable

    def state_dict(self) -> dict[str, Any]:
        """The choice, as numbers of rows or columns by weight; elements are too many for this (`tensors`)."""
        return {
            "kept": {
                part.part.weight: [] if part in self._elements else part.indices.tolist()
                for part in self._parts
                if part.active
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the choice; the values have been restored with the training state."""
        kept: Mapping[str, list[int]] = state["kept"]
        self._set({weight: torch.tensor(numbers, dtype=torch.int64) for weight, numbers in kept.items() if numbers})
        self._pending = False
        self._activate(bool(kept))

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """What this task does not train but others may have: parameters that are frozen now, and the whole weights.
        The numbers of the elements that it trains, of which every rank saves an even share.
        """
        found = {"frozen": self.shards.frozen([*self._frozen, *self._resting])}
        if self._elements:
            found["kept_elements"] = {part.part.weight: self._share(part) for part in self._elements}
        return found

    def tensors_loaded(self) -> None:
        """Give every rank the whole weights, and all numbers, again."""
        self.shards.publish_frozen([*self._frozen, *self._resting])
        for part in self._elements if torch.distributed.get_world_size() > 1 and not self.shards.replicated else ():
            own = self._share(part)
            numbers = torch.zeros_like(part.indices)
            numbers[own.start : own.stop] = own.data
            torch.distributed.all_reduce(numbers)
            part.indices = numbers

    def _share(self, part: KeptPart) -> Shard:
        """What this rank saves of the numbers of a part's elements: live, and together with the others all of them."""
        count, ranks = len(part.indices), 1 if self.shards.replicated else torch.distributed.get_world_size()
        start, stop = even_share(count, torch.distributed.get_rank() % ranks, ranks)
        return Shard(start, part.indices[start:stop])

    @property
    def _elements(self) -> list[KeptPart]:
        return [part for part in self._parts if part.part.along == "elements"]

    @property
    def _resting(self) -> list[str]:
        return [name for name in self.whole if not self.model.get_parameter(name).requires_grad]

    @property
    def _frozen(self) -> list[str]:
        return [name for _, name, _, _ in self._names()]

    @property
    def _sharded(self) -> bool:
        return any(is_sharded(self.model.get_parameter(name)) for name in self._frozen)

    def _names(self) -> Iterator[tuple[str, str, int, KeptPart]]:
        for part in self._parts:
            for kept, name, axis in part.names:
                yield kept, name, axis, part

    def _agreed(self, chosen: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rank 0's choice: on another kind of processor a score may differ in its last bit (collective)."""
        parts = [part for part in self._parts if part.part.weight in chosen]
        if not parts:
            return {}
        device = parts[0].indices.device
        numbers = torch.cat([chosen[part.part.weight].to(device) for part in parts])
        torch.distributed.broadcast(numbers, 0)
        pieces = numbers.split([part.part.count for part in parts])
        return {part.part.weight: piece.clone() for part, piece in zip(parts, pieces, strict=True)}

    def _set(self, chosen: Mapping[str, torch.Tensor]) -> None:
        for part in self._parts:
            if part.part.weight in chosen:
                part.indices = chosen[part.part.weight].to(part.indices)

    def _take_values(self) -> None:
        """Start the trained parts from the weights' values (collective)."""
        names = list(self._names())
        wholes = whole_parameters(self.model, [name for _, name, _, _ in names])
        for (kept, _, axis, part), whole in zip(names, wholes, strict=True):
            if (master := self.shards.master(kept)) is not None:
                values = part.by_unit(whole).index_select(axis, part.indices).reshape(-1)
                master.data.copy_(values[master.start : master.stop])
        self.shards.publish()

    def _activate(self, active: bool) -> None:
        for part in self._parts:
            part.active = active
        self._overlay()

    def _overlay(self) -> None:
        if not self._sharded:
            for part in self._parts:
                if part.active:
                    part.overlay()

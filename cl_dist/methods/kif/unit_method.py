"""What KIF, TaSL and Recurrent-KIF share: skill units, their importance, the penalty on LoRA's ranks, score files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors.torch import save_file

from cl_dist.config.schema import TrainConfig
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.kif.config import UnitConfig
from cl_dist.methods.kif.importance import Importance
from cl_dist.methods.kif.units import UnitMap, Units
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.rehearsal import Rehearsal, Rehearsed
from cl_dist.methods.shared.matrices import WholeMatrices
from cl_dist.models.lora import LORA_A, LORA_B
from cl_dist.models.tracked import row_layouts
from cl_dist.sharding import Shard, ShardView, SteppedGradients
from cl_dist.state.atomic import make_folder, replacing, write_text
from cl_dist.state.run_folder import TaskFolder


class UnitMethod(Method):
    """A method that scores skill units during training.

    Args:
        config: The method's entry in the recipe.
    """

    def __init__(self, config: UnitConfig) -> None:
        super().__init__(config)
        self.config: UnitConfig
        self.keeps_unfused = config.keep_unfused

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """Cut the trained parameters into units, and find the units at both ends of every rank's pieces."""
        config, lora = self.config, any(LORA_A in name for name in rehearsal.shapes)
        units = _units_of(rehearsal.model, rehearsal.shapes, config.units_for(lora))
        ends = 0
        for name, part in units.parts.items():
            pieces = rehearsal.pieces(name)
            elements = np.array([place for piece in pieces for place in (piece.start, piece.stop - 1)])
            ends += len(elements)
            # The unit of an element, by its coordinates in the parameter rather than by strides.
            places = np.unravel_index(elements, part.shape)
            sizes = [part.shape[axis] for axis in part.axes]
            wanted = (
                np.ravel_multi_index([places[axis] for axis in part.axes], sizes) if sizes else np.zeros_like(elements)
            )
            if (part.numbers(torch.from_numpy(elements)).numpy() != wanted).any():
                return Rehearsed(problems=(f"{config.name}: the ranks' pieces of {name} are assigned to wrong units",))
        slices = [part.elements for part in units.parts.values()]
        return Rehearsed(
            notes=(
                f"{config.name}: {len(units)} skill units of {min(slices)} to {max(slices)} elements a slice; fusion "
                f"finds the right unit at all {ends} ends of the ranks' pieces; a rank fuses at most "
                f"{max(sum(piece.numel for piece in owned.values()) for _, owned in rehearsal.ranks())} elements",
            )
        )

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Divide the model into units and allocate zero importance along the shards, also for a rebuilt engine."""
        config, self._lora = self.config, any(LORA_A in name for name in shards.names)
        self._shards, self._device, self._seed = shards, next(model.parameters()).device, train.seed
        shapes = {name: tuple(shards.shape(name)) for name in shards.names}
        self.units = UnitMap.build(shapes, config.units_for(self._lora), row_layouts(model))
        self.importance = Importance(shards, config.importance_dtype)
        self._stepped = SteppedGradients(shards, self._take_stepped) if config.importance_at == "after_update" else None
        self._measured: Importance | None = None
        """Receives the step's importance once the optimiser has stepped."""

    def _cost(self, share: RankShare, *, states: int, copies: int, scores: int, fusions: int = 1) -> Cost:
        """Cost of `states` pairs of importance and deviation, `copies` of the weights and `scores` numbers per unit.

        Every step, LoRA's matrices are summed over the ranks for the penalty. A fusion sums the scores of each pair and
        gathers the fused weights.
        """
        is_lora = any(LORA_A in name for name in share.shapes)
        units = _units_of(share.model, share.shapes, self.config.units_for(is_lora))
        itemsize = 2 if self.config.importance_dtype == "bfloat16" else 4
        importance = states * 2 * itemsize * share.elements
        kept = copies * 4 * share.elements
        penalised = 0
        if self.config.orthogonal_for(is_lora) > 0 and not share.replicated:
            matrices = (shape for name, shape in share.shapes.items() if LORA_A in name or LORA_B in name)
            penalised = sum(4 * math.prod(shape) for shape in matrices)
        slices = 8 * sum(part.count for part in units.parts.values())
        found = Cost(
            host={f"{self.config.name}'s kept weights": kept, f"{self.config.name}'s scores": 8 * scores * len(units)},
            saved=importance + kept,
            step=(share.all_reduce(penalised, "LoRA's matrices for the penalty"),) if penalised else (),
            task=(*[share.sum_over_ranks(slices, "scores of units")] * states, *share.publish()) * fusions,
            # A step reads weight and gradient, and reads and writes one pair of states.
            traffic=(8 + 2 * 2 * itemsize) * share.elements,
        )
        return found + Cost.beside_masters(share, {f"{self.config.name}'s importance": importance})

    def detach(self) -> None:
        """Remove the hook from the optimiser."""
        if self._stepped is not None:
            self._stepped.remove()

    def before_task(self, place: TaskPlace) -> None:
        """Set up the penalty, whose weight may differ from task to task."""
        self._orthogonality = Orthogonality(self._shards, self.config.orthogonal_for(self._lora), self._device)

    def before_update(self) -> None:
        """Add the penalty's gradient, then measure the step's importance."""
        self._orthogonality.add_gradient()
        self._take_importance(self.importance)

    def _take_importance(self, importance: Importance) -> None:
        """Update `importance` with this step: now, or once the optimiser has stepped."""
        if self._stepped is None:
            importance.update(self.config)
        else:
            self._measured = importance

    def _take_stepped(self, gradients: Mapping[str, Shard]) -> None:
        if self._measured is not None:
            self._measured.update_stepped(gradients, self.config)

    def after_update(self) -> None:
        """The step's importance is complete."""
        self._measured = None

    def write_results(self, folder: Path) -> None:
        """Write units and scores into the task's folder."""
        write_scores(folder, self.units, self.score_tensors())

    def score_tensors(self) -> Mapping[str, torch.Tensor]:
        """The last task's scores by name, `(units,)` float64 each, live."""
        raise NotImplementedError

    def _scores_to_save(self) -> dict[str, Shard]:
        """The scores as a part of the saved state; every rank holds all of them."""
        return {name: Shard(0, tensor) for name, tensor in self.score_tensors().items()}

    def _memory_message(self, states: int, copies: int) -> str:
        """What this rank spends on `states` pairs of importance and deviation and on `copies` of the weights."""
        owned, first = self.importance.elements, next(iter(self.units.names), "")
        each = states * self.importance.bytes_per_element
        weights = "the previous task's weights" if copies == 1 else f"{copies} copies of the weights"
        return (
            f"{self.config.name}: {len(self.units)} skill units ({first} is the first); importance takes "
            f"{each * owned} bytes on this rank ({each} for each of its {owned} parameters), "
            f"{weights} {4 * copies * owned} bytes of CPU memory"
        )


_UNITS: WeakKeyDictionary[torch.nn.Module, dict[Units, UnitMap]] = WeakKeyDictionary()


def _units_of(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], units: Units) -> UnitMap:
    """The units of a planned model. A plan asks for them many times, and there can be a million."""
    known = _UNITS.setdefault(model, {})
    if units not in known:
        known[units] = UnitMap.build(shapes, units, row_layouts(model))
    return known[units]


def write_scores(folder: Path, units: UnitMap, scores: Mapping[str, torch.Tensor]) -> None:
    """Write units.json (see `UnitMap.as_json`) and unit_scores.safetensors (`scores`, by name), in the same order.

    Anyone can recompute a task's fusion from them.

    Raises:
        ClDistError: The disk is full; older files are intact.
    """
    make_folder(folder)
    write_text(TaskFolder(folder).units, units.as_text())
    with replacing(TaskFolder(folder).unit_scores) as temporary:
        save_file(dict(scores), temporary)


class Orthogonality:
    """The penalty that keeps LoRA's ranks orthogonal (KIF, arXiv 2408.05200), as a gradient added to the shards.

    `strength * mean over LoRA matrices of ||A A^T - I||_F` (for lora_B `||B^T B - I||_F`), on the float32 masters.

    Args:
        shards: The engine's shards.
        strength: The penalty's weight (lambda).
        device: Where collectives run.
    """

    def __init__(self, shards: ShardView, strength: float, device: torch.device) -> None:
        self._strength = strength
        matrices = {name: LORA_A in name for name in shards.names if LORA_A in name or LORA_B in name}
        wanted = {name: is_a for name, is_a in matrices.items() if strength > 0 and len(shards.shape(name)) == 2}
        self._matrices = WholeMatrices(shards, wanted, device)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to the reduced gradients (collective)."""
        if not len(self._matrices):
            return
        gradients = {
            (is_a, shape): _norm_gradients(matrices) if is_a else _norm_gradients(matrices.mT).mT
            for (is_a, shape), matrices in self._matrices.gather().items()
        }
        self._matrices.add_gradients(gradients, self._strength / len(self._matrices))


def _norm_gradients(matrices: torch.Tensor) -> torch.Tensor:
    """Gradient of ||M||_F, M = A A^T - I, for each A of `(count, r, n)`: 2 M A / ||M||_F, or 0 if A is orthonormal."""
    gram = matrices @ matrices.mT
    gram.diagonal(dim1=1, dim2=2).sub_(1.0)
    norm = torch.linalg.matrix_norm(gram, keepdim=True)
    return torch.where(norm > 0, 2.0 * (gram @ matrices) / norm, 0.0)

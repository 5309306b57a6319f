"""MIGU: update only the rows of each linear layer whose outputs are largest in magnitude (arXiv 2406.17245).

Forward passes add up the magnitudes, one all-reduce sums them over the ranks, and each layer keeps its top rows. With
one micro-batch per step, this happens between forward and backward, and the backward pass skips the other rows
(`shared/row_executor.py`). With several, the mask is known only after the last forward pass, so it is applied to this
rank's shards of the reduced gradients; or, with `mask_scope: micro_batch`, the sums so far mask each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput, ClDistError
from cl_dist.kernels import RowMask, RowMasks, flat_row_masks, kept_rows
from cl_dist.kernels.backend import sent
from cl_dist.kernels.row_magnitude import fold_memory
from cl_dist.methods.cost import Cost, RankShare
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.magnitudes import MagnitudeSums, Plan
from cl_dist.methods.migu.untracked import Untracked
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.methods.rehearsal import Rehearsal, Rehearsed
from cl_dist.methods.shared.kept_counts import BYTES, QUANTITY, KeptCounts
from cl_dist.methods.shared.row_executor import RowExecutor, frozen_rows, layouts_of, skipping_layers
from cl_dist.models.every_expert import module_experts
from cl_dist.models.layer_kinds import TrackedLayer
from cl_dist.models.structure import head_prefixes, is_below
from cl_dist.models.tracked import tracked_layers, unnamed_layers, untracked_matrices
from cl_dist.models.training_mode import layerdrop
from cl_dist.seeds import derive_seed
from cl_dist.sharding import Shard, ShardView
from cl_dist.state.run_folder import TaskFolder

if TYPE_CHECKING:
    from cl_dist.tasks.collate import Batch

_FLOAT64 = _INT64 = 8  # bytes
_INT32 = 4
_MODULUS = 1 << 20  # fingerprints h < 2^20, h^2 < 2^40: exact sums for up to 2^13 ranks


class Migu(Method):
    """Magnitude-based gradient updating.

    Args:
        config: The method's entry in the recipe.
    """

    later_tensors = frozenset((QUANTITY,))

    def __init__(self, config: MiguConfig) -> None:
        super().__init__(config)
        self.keep: dict[str, torch.Tensor] = {}
        """Masks of the latest step by name of a weight or bias: `(rows,)` bool, True for rows that are updated. Experts
        lie one after the other in one mask."""
        self._kept = torch.empty(0, dtype=torch.bool)
        """All of them, one after the other."""
        self._masks_this_task = False
        self._step = 0
        self._micro_batch = self._forwards = 0
        self._summed = 0
        """With `sums: task`, steps of the task whose magnitudes have been added up."""

    def cost(self, share: RankShare) -> Cost:
        """Sums of magnitudes, on a GPU with those that wait to be folded; the chosen rows, their mask, and with several
        ranks the weights of its fingerprint; how often each row was kept; one all-reduce of the sums, and of what
        checks them.

        With `mask: update`, the optimiser neither reads nor writes the dropped rows. Magnitudes read every output once.
        Backward skips the dropped rows where the mask is known in time.
        """
        layers = self._layers_of(share.model)
        sizes = [size for layer in layers.values() for size in layer.sizes]
        rows, kept = sum(sizes), sum(kept_rows(size, self.config.threshold) for size in sizes)
        message = _FLOAT64 * (rows + len(sizes) + len(layers) + 2)
        times = share.train.gradient_accumulation if self.config.mask_scope == "micro_batch" else 1
        waiting = fold_memory(share.tokens, sizes, share.train.gradient_accumulation) if share.gpu else 0
        chosen = _INT64 if self._skips_rows(share.train) else 0  # backward needs the rows' numbers
        gradients, weights = self._unsent(share.model, layers, share.train)
        gathered = weights > 0 and share.gathers_updates
        packed = _INT64 * kept if share.world > 1 and (gradients or gathered) else 0
        owned = sum(share.owned.get(layer.weight, 0) for layer in layers.values())
        frozen = owned * (1 - kept / rows) if self.config.mask == "update" else 0
        recorded = BYTES * rows
        summed = _FLOAT64 * rows if self.config.sums == "task" else 0  # saved, and copied in case a step is skipped
        return frozen_rows(frozen) + Cost(
            device={
                "MIGU's magnitudes": _FLOAT64 * (rows + len(sizes)) + waiting + summed,
                "MIGU's masks": (1 + chosen + (_INT32 if share.world > 1 else 0)) * rows + packed + recorded,
            },
            saved=(recorded + summed) // (1 if share.replicated else share.world),
            step=(share.all_reduce(message * times, "MIGU's magnitudes", times),),
            token_traffic=rows * share.itemsize,
            skipped=self._skipped_shares(layers, share.train),
            unsent_gradients=gradients,
            unsent_weights=weights,
        )

    def _unsent(self, model: nn.Module, layers: Mapping[str, TrackedLayer], train: TrainConfig) -> tuple[int, int]:
        """Elements of gradients and of updated weights that do not travel.

        Several micro-batches with a mask each keep the union of their rows, which nobody knows in advance: counted as
        if all rows travelled.
        """
        if self.config.mask_scope == "micro_batch" and train.gradient_accumulation > 1:
            return 0, 0
        gradients = weights = 0
        skipping = skipping_layers(model, layers)
        for name, layer in layers.items():
            layouts = [layer.layout, *([layer.bias_layout] if layer.bias is not None and self.config.mask_bias else [])]
            dropped = sum(
                layout.matrices * (layout.rows - kept_rows(layout.rows, self.config.threshold)) * layout.length
                for layout in layouts
            )
            weights += dropped
            gradients += dropped if name in skipping else 0
        return (
            0 if self._whole_gradients(train) else gradients,
            0 if self._whole_weights() else weights,
        )

    def _skipped_shares(self, layers: Mapping[str, TrackedLayer], train: TrainConfig) -> dict[str, float]:
        """The share of each weight's gradient that backward does not compute."""
        if not self._skips_rows(train):
            return {}
        return {
            layer.weight: 1 - kept_rows(layer.layout.rows, self.config.threshold) / layer.layout.rows
            for layer in layers.values()
            if layer.kind.skips(layer.module)
        }

    def _skips_rows(self, train: TrainConfig) -> bool:
        """Whether the rows are known before backward, which can then skip the others."""
        known_in_time = train.gradient_accumulation == 1 or self.config.mask_scope != "step"
        return self.config.skip_rows and known_in_time

    def prepare_model(self, model: nn.Module, seed: int) -> None:
        """Find out whether the output head is masked, which then has to run over all positions."""
        self.needs_all_logits = any(is_below(name, head_prefixes(model)) for name in self._layers_of(model))

    def _layers_of(self, model: nn.Module) -> dict[str, TrackedLayer]:
        return tracked_layers(model, self.config.layers, tied_head=self.config.tied_head == "mask")

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Hook the tracked layers, and let them skip rows if the recipe allows it."""
        self._model, self._shards, self._train, self._seed = model, shards, train, train.seed
        layers = self._find_layers(model, shards.numel)
        self._install(layers, plan=None)

    def _find_layers(self, model: nn.Module, numel: Callable[[str], int]) -> dict[str, TrackedLayer]:
        """The layers to track; `self._untracked` has the others. Raises BadInput if there are none."""
        if dropped := layerdrop(model):
            raise BadInput(
                f"method.name: migu measures every layer in every step, but the model's configuration ({dropped}) "
                "skips layers at random during training; allowed: 0"
            )
        layers = self._layers_of(model)
        unnamed = unnamed_layers(model, self.config.layers, layers)
        self._untracked = Untracked(numel, model, untracked_matrices(model, layers), unnamed)
        # Routing decides how many tokens an expert gets, so no trial can show what its outputs are.
        inside = module_experts(model)
        if self.config.sums == "task" and any(layer.kind.routed for layer in layers.values()):
            raise BadInput(
                "method.sums: task adds up what the rows of a layer put out in every step, but an expert of this model "
                "runs only when tokens are routed to it; allowed: step"
            )
        routed = [layer for name, layer in layers.items() if name.startswith(inside)]
        if len(routed) == len(layers):
            raise BadInput("method.layers: the outputs of none of this model's linear layers can be measured")
        self._untracked.add({layer.weight: "it runs over the tokens that are routed to it" for layer in routed})
        return {name: layer for name, layer in layers.items() if layer not in routed}

    def rehearse(self, rehearsal: Rehearsal) -> Rehearsed:
        """Find and try out the layers, and cut the rows of every rank's pieces."""
        self._model, self._train = rehearsal.model, rehearsal.train
        numels = rehearsal.shards.numels
        self._layers = self._find_layers(rehearsal.model, numels.__getitem__)
        config = self.config
        self._check_scope(self._layers)
        sums = MagnitudeSums(rehearsal.model, self._layers, mask_bias=config.mask_bias)
        obstacle = rehearsal.try_out(sums.learn)
        reasons = {} if obstacle else sums.learnt()
        sums.remove()
        self._untracked.add({self._layers[name].weight: reason for name, reason in reasons.items()})
        self._untracked.check(config.untracked)

        # Every rank masks its piece by segments of rows; together they have to hold each row's elements once.
        all_layouts = layouts_of(self._layers, config.mask_bias)
        layouts = {name: layout for name, layout in all_layouts.items() if name in numels}
        segments = 0
        for name, layout in layouts.items():
            held = np.zeros(layout.total + 1, dtype=np.int64)
            for piece in rehearsal.pieces(name):
                for segment in layout.segments(piece.start, piece.numel):
                    held[segment.row] += segment.width
                    held[segment.row + segment.rows] -= segment.width
                    segments += 1
            if (np.cumsum(held)[:-1] != layout.length).any():
                return Rehearsed(problems=(f"migu: the ranks' pieces of {name} do not make up its rows",))
        found = (
            f"migu: {len(self._layers)} tracked layers, {sum(map(_rows, self._layers.values()))} rows; masks cut the "
        )
        notes = [f"{found}ranks' pieces into {segments} runs of rows, which hold every element of every row once"]
        notes += [text] if (text := self._untracked.message()) else []
        if obstacle:
            notes.append(
                f"migu: not checked here: which outputs are tokens, because the model does not run without numbers "
                f"({obstacle}); the two tiny batches at the start of a run check it"
            )
        return Rehearsed(tuple(notes))

    def _install(self, layers: Mapping[str, TrackedLayer], plan: Plan | None) -> None:
        config = self.config
        self._layers = dict(layers)
        per_token = config.magnitude == "per_token"
        self._sums = MagnitudeSums(self._model, layers, per_token, config.count_padding, plan, config.mask_bias)
        self._agreement = Agreement(self._sums.flat.device)
        rows = {layer.weight: layer.layout.total for layer in layers.values()}
        self._counts = KeptCounts(rows, self._sums.flat.device, self._shards.replicated)
        self._check_scope(layers)
        self._executor = RowExecutor(
            self._model,
            self._shards,
            layers,
            dropped=config.mask,
            skips=self._skips_rows(self._train),
            mask_bias=config.mask_bias,
            taps=self._sums.taps,
            whole_gradients=self._whole_gradients(self._train),
            whole_weights=self._whole_weights(),
        )
        self._mask_from_here()

    def _whole_gradients(self, train: TrainConfig) -> str | None:
        """Why whole gradients travel between the ranks, as far as the recipe decides it, or None."""
        if self.config.compact == "off":
            return "method.compact: off"
        if not self.config.skip_rows:
            return "method.skip_rows: false computes all of their rows"
        if not self._skips_rows(train):
            return (
                f"the rows to keep are known only after the last of a step's {train.gradient_accumulation} "
                "micro-batches (method.mask_scope: step)"
            )
        return None

    def _whole_weights(self) -> str | None:
        """The same for the weights that are gathered after a step."""
        if self.config.compact == "off":
            return "method.compact: off"
        return None if self.config.mask == "update" else "method.mask: gradient moves dropped rows too"

    def _check_scope(self, layers: Mapping[str, TrackedLayer]) -> None:
        """Raise BadInput if the recipe asks for masks of single micro-batches, but some layer cannot skip rows."""
        if self.config.mask_scope != "micro_batch" or self._train.gradient_accumulation == 1:
            return
        skipping = skipping_layers(self._model, layers)
        if whole := [layer.weight for name, layer in layers.items() if name not in skipping]:
            raise BadInput(
                f"method.mask_scope: micro_batch masks inside the backward pass, which {min(whole)} does not allow; "
                "allowed for this model: step"
            )

    def detach(self) -> None:
        """Remove the hooks from the layers and the optimiser."""
        self._sums.remove()
        self._executor.remove()

    def before_trial(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """Record the shapes of the layers' outputs."""
        self._sums.learn(token_masks)

    def after_trials(self, idle: Set[str]) -> None:
        """Refuse layers that cannot be measured, or train them without a mask; those without gradients do not count."""
        reasons = self._sums.learnt()
        if not reasons:
            self._untracked.check(self.config.untracked)
            return
        trained = {name: reason for name, reason in reasons.items() if self._layers[name].weight not in idle}
        self._untracked.add({self._layers[name].weight: reason for name, reason in trained.items()})
        self._untracked.check(self.config.untracked)
        rest = {name: layer for name, layer in self._layers.items() if name not in reasons}
        if not rest:
            raise BadInput("method.layers: the outputs of none of this model's linear layers can be measured")
        plan = self._sums.plan
        self.detach()
        self._install(rest, plan)

    def start_message(self) -> str | None:
        """The weights that are trained without a mask, and whether only kept rows travel."""
        traffic = self._executor.message()
        lines = [self._untracked.message(), f"migu: {traffic}" if traffic else None]
        return "\n".join(line for line in lines if line) or None

    def before_task(self, place: TaskPlace) -> None:
        """Mask this task, unless it is the first and the recipe trains that one without a mask."""
        self._masks_this_task = place.index > 0 or self.config.first_task == "masked"
        self._task = place.index
        self._mask_from_here()

    def _mask_from_here(self) -> None:
        """Turn counting and skipping on or off, and discard an unfinished step; also if a task's engine is rebuilt."""
        self._sums.counting = self._executor.active = self._masks_this_task
        self._end_step()

    def _start_step(self) -> None:
        if self.config.sums == "step":
            self._sums.clear()
        self._micro_batch = self._forwards = 0

    def before_step(self, step: int) -> None:
        """Begin new records of kept rows and magnitudes with a task's first step."""
        self._counts.begin(step)
        if self.config.sums == "task":
            # A resume has restored the sums of the steps before, which came after `before_task`.
            if step == 0:
                self._sums.clear()
                self._summed = 0
            self._sums_before = self._sums.remembered()

    def before_forward(self, step: int, batch: Batch) -> None:
        """Remember which tokens count, and drop the rows chosen for the previous backward pass."""
        self._step = step
        self._sums.begin(batch.token_masks)
        if not self._ahead:
            self._executor.forget()
        elif self._forwards == 0:
            self._look_ahead()
        self._forwards += 1

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Choose the rows that this micro-batch's backward pass computes."""
        if self._executor.active and not self._ahead:
            self._skip_others()
        return loss

    @property
    def _ahead(self) -> bool:
        return self.config.mask_scope == "ahead"

    def _look_ahead(self) -> None:
        """Choose a step's rows before its first forward pass, from the task's steps so far, if there are any."""
        known = self._masks_this_task and self._summed > 0
        self._executor.active = known
        self._executor.forget()
        if known:
            self._skip_others()

    def _skip_others(self) -> None:
        """Choose the rows that backward computes from now on."""
        keep, masks = self._choose_rows()
        self._remember(keep)
        self._executor.choose(self.keep, {name: [mask.rows for mask in of_layer] for name, of_layer in masks.items()})

    def before_update(self) -> None:
        """Zero the gradients of the rows that are not kept, unless backward has skipped them already."""
        if not self._masks_this_task:
            self._check_ran()
            return
        if self._micro_batch == 0:  # they were not known in time
            self._remember(self._choose_rows()[0])
            self._executor.apply(self.keep)
        else:
            self._executor.apply()
        self._counts.add(self._kept)

    def kept_share(self) -> float | None:
        """Everything but the dropped rows, by the record of kept rows."""
        elements = {name: self._shards.numel(name) for name in self._shards.names}
        whole = sum(elements.values())
        updated = self._counts.updated(elements) if self._masks_this_task else whole
        return None if updated is None else updated / whole

    def write_results(self, folder: Path) -> None:
        """Write into the task's folder how often each row was kept."""
        self._counts.write(TaskFolder(folder).kept_rows, masked=self._masks_this_task)

    def state_dict(self) -> dict[str, Any]:
        """Which steps the record of kept rows includes, and how many the sums of magnitudes."""
        return {QUANTITY: self._counts.state(), **({"summed": self._summed} if self.config.sums == "task" else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the record of kept rows."""
        self._counts.restore(state.get(QUANTITY))
        self._summed = state.get("summed", 0)

    def tensors(self) -> dict[str, dict[str, Shard]]:
        """The record of kept rows; with `sums: task` the magnitudes too."""
        found = {QUANTITY: self._counts.tensors()}
        if self.config.sums == "task":
            found["magnitudes"] = self._sums.tensors(self._shards.replicated)
        return found

    def tensors_loaded(self) -> None:
        """Give every rank the whole record again."""
        self._counts.tensors_loaded()
        if self.config.sums == "task":
            self._sums.tensors_loaded(self._shards.replicated)

    def before_save(self) -> None:
        """Check now that the ranks agree on the last masks, rather than in the next step."""
        if self.config.sums == "task":
            self._sums.before_save(self._shards.replicated)
        if torch.distributed.get_world_size() > 1:
            message = self._agreement.message()
            torch.distributed.all_reduce(message)
            self._agreement.check(message.tolist())

    def update_skipped(self) -> None:
        """Discard the sums of the skipped step."""
        if self.config.sums == "task":
            self._sums.recall(self._sums_before)
        self._end_step()

    def after_update(self) -> None:
        """Reset the sums for the next step, or count the step that they include now."""
        self._summed += 1
        self._end_step()

    def _end_step(self) -> None:
        self._start_step()
        self._executor.end_step()

    def _choose_rows(self) -> tuple[torch.Tensor, dict[str, list[RowMask]]]:
        """Choose the rows to keep in each layer (in each expert), from all ranks' sums so far in this step.

        All layers lie in flat tensors on the device, and the host waits for it once, for the numbers of kept rows and
        everything that it checks.

        Returns:
            The mask of all layers' rows, one after the other, and each layer's own, by name.
        """
        flat, tokens, checked = self._global_sums()
        sizes = self._sums.sizes
        if self.config.selection == "random":
            masks = self._random_rows(flat.device)
        else:
            masks = flat_row_masks(flat, sizes, self.config.threshold)
        found = torch.cat([checked, masks.counts.to(checked)]).tolist()
        self._check(found[: len(checked)])
        keep = masks.keep if not self._sums.taps else masks.keep & self._of_hit_experts(tokens)
        if torch.distributed.get_world_size() > 1:  # a single rank agrees with itself
            self._agreement.remember(keep)
        left = iter(masks._replace(keep=keep).split(sizes, [int(count) for count in found[len(checked) :]]))
        return keep, {name: [next(left) for _ in layer.sizes] for name, layer in self._layers.items()}

    def _of_hit_experts(self, tokens: torch.Tensor) -> torch.Tensor:
        """All rows but those of experts that got no token, which must not move, `(rows,)` bool.

        They have no magnitudes to choose by, and backward never asks for their rows.
        """
        sizes = self._sums.sizes
        dense = np.array([not layer.kind.routed for layer in self._layers.values() for _ in layer.sizes])
        hit = (tokens > 0) | sent(dense, tokens.device)
        return hit.repeat_interleave(sent(np.array(sizes), tokens.device), output_size=sum(sizes))

    def _global_sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum magnitudes and experts' tokens over all ranks: MIGU's only collective.

        Returns:
            Both sums, and what `_check` needs to know on the host: from the same message, whether the ranks agreed on
            the last masks and whether every layer was measured.
        """
        own = [self._sums.flat, self._sums.tokens]
        calls = np.fromiter(self._sums.calls.values(), np.float64, len(self._layers))
        if torch.distributed.get_world_size() == 1:
            self._check_measured(calls.tolist())
            return own[0], own[1], own[0][:0]
        message = torch.cat([*own, sent(calls, own[0].device), self._agreement.message()])
        torch.distributed.all_reduce(message)
        flat, tokens, rest = message.split([own[0].numel(), own[1].numel(), len(calls) + 2])
        return flat, tokens, rest

    def _check(self, summed: Sequence[float]) -> None:
        """Check the numbers of `_global_sums`; none with a single rank."""
        if summed:
            self._agreement.check(summed[-2:])
            self._check_measured(summed[:-2])

    def _check_ran(self) -> None:
        """Check in the first step, masked or not, that training runs the same layers as the trials did."""
        missing, self._sums.awaited = self._sums.awaited, None
        if missing:
            raise _unmeasured([name for name in self._layers if name in missing])

    def _check_measured(self, calls: Sequence[float]) -> None:
        """Check that some rank measured each layer. All ranks see the same counts, so they fail together."""
        missing = [name for name, count in zip(self._layers, calls, strict=True) if count == 0]
        if missing:
            raise _unmeasured(missing)

    def _random_rows(self, device: torch.device) -> RowMasks:
        """As many rows, drawn at random from (seed, task, step, layer): the same on all ranks and after a resume."""
        sizes = self._sums.sizes
        starts = np.cumsum([0, *sizes])
        keep, rows = np.zeros(starts[-1], np.bool_), np.zeros(starts[-1], np.int64)
        counts = [kept_rows(size, self.config.threshold) for size in sizes]
        for number, (start, size, count) in enumerate(zip(starts, sizes, counts, strict=False)):
            seed = derive_seed(self._seed, "random rows", self._task, self._step, number)
            chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort().values.numpy()
            keep[start + chosen] = True
            rows[start : start + count] = chosen
        return RowMasks(*(sent(numbers, device) for numbers in (keep, rows, np.array(counts, np.int64))))

    def _remember(self, keep: torch.Tensor) -> None:
        """Record the step's masks; if each micro-batch has its own, their union: rows that any of them updates."""
        self._kept = keep if self._micro_batch == 0 else self._kept | keep
        self._micro_batch += 1
        totals = [layer.layout.total for layer in self._layers.values()]
        self.keep = {}
        for layer, of_layer in zip(self._layers.values(), self._kept.split(totals), strict=True):
            self.keep[layer.weight] = of_layer
            if layer.bias is not None and self.config.mask_bias:
                self.keep[layer.bias] = of_layer


class Agreement:
    """Checks, without an extra collective, that all ranks chose the same rows in the last step.

    Each rank appends two numbers to a sum all-reduce that happens anyway: a fingerprint h of its masks, and h squared.
    By the Cauchy-Schwarz inequality, n * sum(h^2) = (sum h)^2 exactly if all n fingerprints are equal. Fingerprints are
    integers, small enough for double precision to be exact. A disagreement is thus found one step later.

    Args:
        device: Device of the all-reduced vector.
    """

    def __init__(self, device: torch.device) -> None:
        self._message = torch.zeros(2, dtype=torch.float64, device=device)
        self._weights = torch.empty(0, dtype=torch.int32, device=device)

    def remember(self, keep: torch.Tensor) -> None:
        """Compute the fingerprint of this step's mask, `(rows,)` bool, on its device: a sum of random weights."""
        if len(self._weights) != len(keep):
            weights = torch.randint(_MODULUS, keep.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
            self._weights = sent(weights.numpy(), keep.device)
        fingerprint = (self._weights * keep).sum().remainder(_MODULUS).double()
        self._message = torch.stack([fingerprint, fingerprint.square()])

    def message(self) -> torch.Tensor:
        """`(2,)` float64 to include in the sum all-reduce."""
        return self._message.clone()

    def check(self, summed: Sequence[float]) -> None:
        """Check the sum of all ranks' messages.

        Raises:
            ClDistError: The ranks chose different rows, so the run's weights can't be trusted.
        """
        total, squares = (int(value) for value in summed)
        if torch.distributed.get_world_size() * squares != total**2:
            raise ClDistError(
                f"rank {torch.distributed.get_rank()}: the ranks chose different rows in the last step (their masks' "
                "fingerprints differ); the weights have diverged, resume from the last saved state"
            )


def _rows(layer: TrackedLayer) -> int:
    return layer.layout.total


def _unmeasured(missing: Sequence[str]) -> ClDistError:
    return ClDistError(
        f"method migu: the output of {missing[0]}"
        + (f" and {len(missing) - 1} other layers" if missing[1:] else "")
        + " was not measured in this step on any rank, so its rows cannot be chosen; MIGU needs every layer in every "
        "step"
    )

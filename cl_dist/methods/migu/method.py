"""MIGU: update only the rows of each linear layer whose outputs are largest in magnitude (arXiv 2406.17245).

Magnitudes are summed while forward passes run; one all-reduce makes the sums global and the top rows of every layer are
kept. With one micro-batch a step that happens between forward and backward, and the backward pass skips the other rows
(`models/skipping.py`). With more, the mask is known only after the last forward pass, so it is applied to this rank's
shards of the reduced gradients; or, with `mask_scope: micro_batch`, each micro-batch is masked by the sums so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput, ClDistError
from cl_dist.kernels import RowLayout, RowMask, kept_rows, mask_rows_, topk_row_masks
from cl_dist.methods.migu.agreement import Agreement
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.magnitudes import MagnitudeSums, Plan
from cl_dist.methods.migu.untracked import Untracked
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.every_expert import module_experts
from cl_dist.models.layer_kinds import TrackedLayer
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import tracked_layers, untracked_matrices
from cl_dist.models.training_mode import layerdrop
from cl_dist.seeds import derive_seed
from cl_dist.sharding import RowFreezer, ShardView

if TYPE_CHECKING:
    from cl_dist.tasks.collate import Batch


class Migu(Method):
    """Magnitude-based gradient updating.

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: MiguConfig) -> None:
        super().__init__(config)
        self.needs_all_logits = config.layers == "all"
        self.keep: dict[str, torch.Tensor] = {}
        """The newest step's masks: `(rows,)` bool by name of a weight or bias, of all experts one after the other; True
        where a row is updated."""
        self._masks_this_task = False
        self._step = 0
        self._micro_batch = 0

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Hook the tracked layers, and let them skip rows where the recipe allows it."""
        self._model, self._shards, self._train, self._seed = model, shards, train, train.seed
        if dropped := layerdrop(model):
            raise BadInput(
                f"method.name: migu measures every layer in every step, but the model's configuration ({dropped}) "
                "leaves out layers at random while it trains; allowed is 0 there"
            )
        layers = tracked_layers(model, self.config.layers)
        self._untracked = Untracked(shards, model, untracked_matrices(model, layers))
        # How many tokens come to an expert is chance: no trial could say what its outputs are.
        inside = module_experts(model)
        routed = [layer for name, layer in layers.items() if name.startswith(inside)]
        if len(routed) == len(layers):
            raise BadInput("method.layers: the outputs of none of this model's linear layers can be measured")
        self._untracked.add({layer.weight: "it runs over the tokens that are routed to it" for layer in routed})
        self._install({name: layer for name, layer in layers.items() if layer not in routed}, plan=None)

    def _install(self, layers: Mapping[str, TrackedLayer], plan: Plan | None) -> None:
        config = self.config
        self._layers = layers
        per_token = config.magnitude == "per_token"
        self._sums = MagnitudeSums(self._model, layers, per_token, config.count_padding, plan, config.mask_bias)
        self._agreement = Agreement(self._sums.flat.device)
        self._layouts = self._row_layouts()
        self._freezer = RowFreezer(self._shards, self._layouts) if config.mask == "update" else None
        whole = [layer for layer in layers.values() if not layer.kind.skips(layer.module)]
        # Layers whose rows backward computes all: routers, and linear layers with a forward of their own.
        self._not_skipped = {name for layer in whole for name in (layer.weight, layer.bias) if name is not None}
        known_in_time = self._train.gradient_accumulation == 1 or config.mask_scope == "micro_batch"
        self._skipper = RowSkipper(self._skippable(), config.mask_bias) if config.skip_rows and known_in_time else None
        for tap in self._sums.taps.values():
            tap.skips = self._skipper is not None
        self._mask_from_here()

    def _row_layouts(self) -> dict[str, RowLayout]:
        """How the rows lie, by name of every weight and bias that is masked."""
        layouts = {layer.weight: layer.layout for layer in self._layers.values()}
        if self.config.mask_bias:
            layouts |= {layer.bias: layer.bias_layout for layer in self._layers.values() if layer.bias is not None}
        return layouts

    def _skippable(self) -> dict[str, nn.Module]:
        """The layers that `RowSkipper` takes; others skip in their taps or not at all.

        Raises:
            BadInput: Masks of single micro-batches are asked for, and there is a layer that cannot skip.
        """
        if not self.config.skip_rows:
            return {}
        if self._not_skipped and self.config.mask_scope == "micro_batch" and self._train.gradient_accumulation > 1:
            raise BadInput(
                f"method.mask_scope: micro_batch masks inside the backward pass, which {min(self._not_skipped)} does "
                "not allow; allowed for this model is step"
            )
        return {
            name: layer.module
            for name, layer in self._layers.items()
            if not layer.kind.tapped and layer.weight not in self._not_skipped
        }

    def detach(self) -> None:
        """Remove the layer hooks and the optimiser hooks."""
        self._sums.remove()
        if self._skipper is not None:
            self._skipper.remove()
        if self._freezer is not None:
            self._freezer.remove()

    def before_trial(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """See what the layers' outputs are."""
        self._sums.learn(token_masks)

    def after_trials(self, idle: Set[str]) -> None:
        """Refuse what cannot be measured, or train it without a mask; what gets no gradient at all is not missed."""
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
        """Name what is trained without a mask."""
        return self._untracked.message()

    def before_task(self, place: TaskPlace) -> None:
        """The first task is trained without a mask unless the recipe asks for one."""
        self._masks_this_task = place.index > 0 or self.config.first_task == "masked"
        self._task = place.index
        self._mask_from_here()

    def _mask_from_here(self) -> None:
        """Count and skip, or do not, with nothing left of a step that broke off; also for an engine built in a task."""
        self._sums.counting = self._masks_this_task
        if self._skipper is not None:
            self._skipper.active = self._masks_this_task
        self._start_step()

    def _start_step(self) -> None:
        self._sums.clear()
        self._micro_batch = 0

    def before_forward(self, step: int, batch: Batch) -> None:
        """Remember which tokens count; rows chosen for an earlier backward pass serve no other."""
        self._step = step
        self._sums.begin(batch.token_masks)
        self._forget_rows()

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Choose the rows that this micro-batch's backward pass computes."""
        if self._masks_this_task and self._skipper is not None:
            masks = self._choose_rows()
            self._skipper.choose({name: of_layer[0].rows for name, of_layer in masks.items()})
            for name, tap in self._sums.taps.items():
                tap.rows = {
                    layer.rpartition(".")[2]: [mask.rows for mask in of_layer]
                    for layer, of_layer in masks.items()
                    if layer.rpartition(".")[0] == name
                }
            self._remember(masks)
        return loss

    def before_update(self) -> None:
        """Zero the gradients of the rows that are not kept, where backward has not left it at that."""
        if not self._masks_this_task:
            self._check_ran()
            return
        if self._skipper is None:
            self._remember(self._choose_rows())
        for name, keep in self.keep.items():
            # Rows that backward has skipped are zero already, unless a method before this one has added to them.
            if self._skipper is None or name in self._shards.edited or name in self._not_skipped:
                self._mask_gradient(name, keep)
        if self._freezer is not None:
            self._freezer.freeze(self.keep)

    def before_save(self) -> None:
        """The check of the last masks would come with the next step; before a save it comes at once."""
        if torch.distributed.get_world_size() > 1:
            message = self._agreement.message()
            torch.distributed.all_reduce(message)
            self._agreement.check(message)

    def update_skipped(self) -> None:
        """The sums of a step that is not finite are no use to the next one."""
        self.after_update()

    def after_update(self) -> None:
        """Start the next step's sums from zero."""
        self._start_step()
        self._forget_rows()
        if self._freezer is not None:
            self._freezer.freeze({})

    def _forget_rows(self) -> None:
        if self._skipper is not None:
            self._skipper.forget()
        for tap in self._sums.taps.values():
            tap.rows = None

    def _choose_rows(self) -> dict[str, list[RowMask]]:
        """The kept rows of every layer (of experts: of each), from all ranks' sums so far in this step."""
        sums, tokens = self._global_sums()
        if self.config.selection == "random":
            masks = [self._random_rows(number, rows) for number, rows in enumerate(self._sums.sizes)]
        else:
            masks = topk_row_masks(sums, self._sums.sizes, self.config.threshold)
        if self._sums.taps:
            masks = self._none_of_idle_experts(masks, tokens > 0)
        left = iter(masks)
        found = {name: [next(left) for _ in layer.sizes] for name, layer in self._layers.items()}
        if torch.distributed.get_world_size() > 1:  # one rank agrees with itself, and a GPU need not wait for it
            self._agreement.remember(mask.keep for of_layer in found.values() for mask in of_layer)
        return found

    def _none_of_idle_experts(self, masks: list[RowMask], hit: torch.Tensor) -> list[RowMask]:
        """An expert to which no token was routed has no magnitudes: it keeps no row, so that nothing of it moves.

        Backward never asks for its rows.
        """
        is_expert = [layer.kind.routed for layer in self._layers.values() for _ in layer.sizes]
        return [
            RowMask(mask.keep & expert_hit, mask.rows) if of_experts else mask
            for mask, of_experts, expert_hit in zip(masks, is_expert, hit.unbind(), strict=True)
        ]

    def _global_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Magnitudes and experts' tokens of all ranks: the only collective.

        It carries the check that the last masks agreed, and that every layer was measured.
        """
        own, calls = [self._sums.flat, self._sums.tokens], list(self._sums.calls.values())
        if torch.distributed.get_world_size() == 1:
            self._check_measured(calls)
            return self._sums.flat, self._sums.tokens
        numbers = torch.tensor(calls, dtype=torch.float64).to(self._sums.flat.device)
        message = torch.cat([*own, numbers, self._agreement.message()])
        torch.distributed.all_reduce(message)
        flat, tokens, rest = message.split([own[0].numel(), own[1].numel(), len(calls) + 2])
        rest = rest.cpu()  # a GPU is waited for once
        self._agreement.check(rest[len(calls) :])
        self._check_measured(rest[: len(calls)].tolist())
        return flat, tokens

    def _check_ran(self) -> None:
        """A model may take another way in training than in the trials; the first step shows it, masked or not."""
        missing, self._sums.awaited = self._sums.awaited, None
        if missing:
            raise _unmeasured([name for name in self._layers if name in missing])

    def _check_measured(self, calls: Sequence[float]) -> None:
        """All ranks see the same numbers."""
        missing = [name for name, count in zip(self._layers, calls, strict=True) if count == 0]
        if missing:
            raise _unmeasured(missing)

    def _random_rows(self, number: int, rows: int) -> RowMask:
        """As many rows, drawn from (seed, task, step, layer): the same on every rank and after a resume."""
        seed = derive_seed(self._seed, "random rows", self._task, self._step, number)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(rows, generator=generator)[: kept_rows(rows, self.config.threshold)]
        keep = torch.zeros(rows, dtype=torch.bool)
        keep[chosen] = True
        device = self._sums.flat.device
        return RowMask(keep.to(device), chosen.sort().values.to(device))

    def _remember(self, masks: dict[str, list[RowMask]]) -> None:
        """Keep the step's masks; of several micro-batches with masks of their own, what any of them updates."""
        keep: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            of_layer = masks[name]
            whole = of_layer[0].keep if len(of_layer) == 1 else torch.cat([mask.keep for mask in of_layer])
            keep[layer.weight] = whole
            if layer.bias is not None and self.config.mask_bias:
                keep[layer.bias] = whole
        self.keep = keep if self._micro_batch == 0 else {name: self.keep[name] | mask for name, mask in keep.items()}
        self._micro_batch += 1

    def _mask_gradient(self, name: str, keep: torch.Tensor) -> None:
        shard = self._shards.gradient(name)
        if shard is None:
            return
        mask_rows_(shard.data, shard.start, self._layouts[name], keep.to(shard.data.device))
        self._shards.gradient_changed(name)


def _unmeasured(missing: Sequence[str]) -> ClDistError:
    return ClDistError(
        f"method migu: the output of {missing[0]}"
        + (f" and {len(missing) - 1} other layers" if missing[1:] else "")
        + " was not measured in this step on any rank, so its rows cannot be chosen; MIGU needs every layer in every "
        "step"
    )

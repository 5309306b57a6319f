"""MIGU: update only the rows of each linear layer whose outputs are largest in magnitude (arXiv 2406.17245).

Magnitudes are summed while forward passes run; one all-reduce makes the sums global and the top rows of every layer are
kept. With one micro-batch a step that happens between forward and backward, and the backward pass skips the other rows
(`models/skipping.py`). With more, the mask is known only after the last forward pass, so it is applied to this rank's
shards of the reduced gradients; or, with `mask_scope: micro_batch`, each micro-batch is masked by the sums so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cl_dist.config.methods import MiguConfig
from cl_dist.config.schema import TrainConfig
from cl_dist.kernels import RowMask, apply_row_mask_, kept_rows, topk_row_masks
from cl_dist.methods.agreement import Agreement
from cl_dist.methods.base import Method, TaskPlace
from cl_dist.methods.magnitudes import MagnitudeSums
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import tracked_linears
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
        self.config = config
        self.needs_all_logits = config.layers == "all"
        self.keep: dict[str, torch.Tensor] = {}
        """The newest step's masks: `(out_features,)` bool by name of a weight or bias, True where a row is updated."""
        self._masks_this_task = False
        self._step = 0
        self._micro_batch = 0

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Hook the tracked layers, and let them skip rows where the recipe allows it."""
        config = self.config
        self._shards, self._seed = shards, train.seed
        self._layers = tracked_linears(model, config.layers)
        self._sums = MagnitudeSums(model, self._layers, config.magnitude == "per_token", config.count_padding)
        self._agreement = Agreement(self._sums.flat.device)
        self._freezer = RowFreezer(shards) if config.mask == "update" else None
        known_in_time = train.gradient_accumulation == 1 or config.mask_scope == "micro_batch"
        self._skipper = RowSkipper(self._layers, config.mask_bias) if config.skip_rows and known_in_time else None
        self._mask_from_here()

    def detach(self) -> None:
        """Remove the layer hooks and the optimiser hooks."""
        self._sums.remove()
        if self._skipper is not None:
            self._skipper.remove()
        if self._freezer is not None:
            self._freezer.remove()

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
        self._sums.token_masks = batch.token_masks
        if self._skipper is not None:
            self._skipper.forget()

    def before_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Choose the rows that this micro-batch's backward pass computes."""
        if self._masks_this_task and self._skipper is not None:
            masks = self._choose_rows()
            self._skipper.choose({name: mask.rows for name, mask in masks.items()})
            self._remember(masks)
        return loss

    def before_update(self) -> None:
        """Zero the gradients of the rows that are not kept, where backward has not left it at that."""
        if not self._masks_this_task:
            return
        if self._skipper is None:
            self._remember(self._choose_rows())
        for name, keep in self.keep.items():
            # Rows that backward has skipped are zero already, unless a method before this one has added to them.
            if self._skipper is None or name in self._shards.edited:
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
        if self._skipper is not None:
            self._skipper.forget()
        if self._freezer is not None:
            self._freezer.freeze({})

    def _choose_rows(self) -> dict[str, RowMask]:
        """The kept rows of every layer, from all ranks' sums so far in this step."""
        sums = self._global_sums()
        if self.config.selection == "random":
            masks = [self._random_rows(number, rows) for number, rows in enumerate(self._sums.sizes)]
        else:
            masks = topk_row_masks(sums, self._sums.sizes, self.config.threshold)
        if torch.distributed.get_world_size() > 1:  # one rank agrees with itself, and a GPU need not wait for it
            self._agreement.remember(mask.keep for mask in masks)
        return dict(zip(self._layers, masks, strict=True))

    def _global_sums(self) -> torch.Tensor:
        """Sum over ranks: the only collective. It carries the check that the last masks agreed."""
        flat = self._sums.flat
        if torch.distributed.get_world_size() == 1:
            return flat
        message = torch.cat([flat, self._agreement.message()])
        torch.distributed.all_reduce(message)
        self._agreement.check(message[flat.numel() :])
        return message[: flat.numel()]

    def _random_rows(self, number: int, rows: int) -> RowMask:
        """As many rows, drawn from (seed, task, step, layer): the same on every rank and after a resume."""
        seed = derive_seed(self._seed, "random rows", self._task, self._step, number)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(rows, generator=generator)[: kept_rows(rows, self.config.threshold)]
        keep = torch.zeros(rows, dtype=torch.bool)
        keep[chosen] = True
        device = self._sums.flat.device
        return RowMask(keep.to(device), chosen.sort().values.to(device))

    def _remember(self, masks: dict[str, RowMask]) -> None:
        """Keep the step's masks; of several micro-batches with masks of their own, what any of them updates."""
        keep: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            keep[f"{name}.weight"] = masks[name].keep
            if layer.bias is not None and layer.bias.requires_grad and self.config.mask_bias:
                keep[f"{name}.bias"] = masks[name].keep
        self.keep = keep if self._micro_batch == 0 else {name: self.keep[name] | mask for name, mask in keep.items()}
        self._micro_batch += 1

    def _mask_gradient(self, name: str, keep: torch.Tensor) -> None:
        shard = self._shards.gradient(name)
        if shard is None:
            return
        row_length = self._shards.numel(name) // keep.numel()
        apply_row_mask_(shard.data, shard.start, row_length, keep.to(shard.data.device))
        self._shards.gradient_changed(name)

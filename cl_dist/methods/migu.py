"""MIGU: update only the rows of each linear layer whose outputs are largest in magnitude (arXiv 2406.17245).

Magnitudes are summed while the forward passes of a step run; once its gradients are reduced, one all-reduce makes the
sums global, the top rows of every layer are kept, and the other rows' gradients are zeroed in this rank's shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cl_dist.config.schema import MiguConfig, TrainConfig
from cl_dist.kernels import apply_row_mask_, kept_rows, row_magnitude, topk_row_mask
from cl_dist.methods.agreement import Agreement
from cl_dist.methods.base import Method, TaskPlace
from cl_dist.models.tracked import token_mask_of, tracked_linears
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
        """The current step's masks: `(out_features,)` bool by the name of the weight, True where a row is updated."""
        self._masks_this_task = False
        self._step = 0

    def attach(self, model: torch.nn.Module, shards: ShardView, train: TrainConfig) -> None:
        """Hook the tracked layers and lay their magnitude sums out in one flat vector."""
        self._shards, self._model, self._seed = shards, model, train.seed
        self._layers = tracked_linears(model, self.config.layers)
        rows = [layer.out_features for layer in self._layers.values()]
        device = next(iter(self._layers.values())).weight.device
        self._flat = torch.zeros(sum(rows), dtype=torch.float64, device=device)
        self._sums = dict(zip(self._layers, self._flat.split(rows), strict=True))
        self._agreement = Agreement(self._flat.device)
        self._token_masks: dict[str, torch.Tensor] = {}
        self._handles = [layer.register_forward_hook(self._recorder(name)) for name, layer in self._layers.items()]
        self._freezer = RowFreezer(shards) if self.config.mask == "update" else None

    def detach(self) -> None:
        """Remove the layer hooks and the optimiser hooks."""
        for handle in self._handles:
            handle.remove()
        if self._freezer is not None:
            self._freezer.remove()

    def before_task(self, place: TaskPlace) -> None:
        """The first task is trained without a mask unless the recipe asks for one."""
        self._masks_this_task = place.index > 0 or self.config.first_task == "masked"
        self._task = place.index

    def before_forward(self, step: int, batch: Batch) -> None:
        """Remember which tokens count."""
        self._step = step
        self._token_masks = batch.token_masks

    def before_update(self) -> None:
        """Choose the rows and zero the gradients of the others."""
        if not self._masks_this_task:
            return
        self._reduce_sums()
        self.keep = self._choose_rows()
        self._agreement.remember(self.keep.values())
        for name, keep in self.keep.items():
            self._mask_gradient(name, keep)
        if self._freezer is not None:
            self._freezer.freeze(self.keep)

    def before_save(self) -> None:
        """The check of the last step's masks would come with the next step; before a save it comes at once."""
        if torch.distributed.get_world_size() > 1:
            message = self._agreement.message()
            torch.distributed.all_reduce(message)
            self._agreement.check(message)

    def after_update(self) -> None:
        """Start the next step's sums from zero."""
        self._flat.zero_()
        if self._freezer is not None:
            self._freezer.freeze({})

    def _recorder(self, name: str) -> Callable[[torch.nn.Module, Any, torch.Tensor], None]:
        """Return the forward hook that adds one layer's magnitudes."""
        kind = token_mask_of(name, self._model)

        def record(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
            # A forward pass inside backward recomputes activations: those tokens were counted the first time.
            if not self._masks_this_task or not module.training or torch._C._current_graph_task_id() != -1:
                return
            counted = self._counted_tokens(kind, output)
            self._sums[name] += row_magnitude(output, counted, per_token=self.config.magnitude == "per_token")

        return record

    def _counted_tokens(self, kind: str, output: torch.Tensor) -> torch.Tensor | None:
        """Bool of the leading shape of `output`: the tokens that count, or None for all of them."""
        if self.config.count_padding:
            return None
        mask = self._token_masks[kind]
        # A classifier's head runs over one vector per sample: fillers have no real token and do not count.
        return mask.any(dim=1) if output.dim() == 2 else mask

    def _reduce_sums(self) -> None:
        """Sum over ranks: the only collective of a step. It carries the check that the last step's masks agreed."""
        if torch.distributed.get_world_size() == 1:
            return
        message = torch.cat([self._flat, self._agreement.message()])
        torch.distributed.all_reduce(message)
        self._agreement.check(message[self._flat.numel() :])
        self._flat.copy_(message[: self._flat.numel()])

    def _choose_rows(self) -> dict[str, torch.Tensor]:
        keep: dict[str, torch.Tensor] = {}
        for number, (name, layer) in enumerate(self._layers.items()):
            mask = self._random_rows(number, layer) if self.config.selection == "random" else self._largest_rows(name)
            keep[f"{name}.weight"] = mask
            if layer.bias is not None and layer.bias.requires_grad and self.config.mask_bias:
                keep[f"{name}.bias"] = mask
        return keep

    def _largest_rows(self, name: str) -> torch.Tensor:
        return topk_row_mask(self._sums[name], self.config.threshold)

    def _random_rows(self, number: int, layer: torch.nn.Linear) -> torch.Tensor:
        """As many rows, drawn from (seed, task, step, layer): the same on every rank and after a resume."""
        seed = derive_seed(self._seed, "random rows", self._task, self._step, number)
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(layer.out_features, dtype=torch.bool)
        chosen = torch.randperm(layer.out_features, generator=generator)
        mask[chosen[: kept_rows(layer.out_features, self.config.threshold)]] = True
        return mask.to(self._flat.device)

    def _mask_gradient(self, name: str, keep: torch.Tensor) -> None:
        shard = self._shards.gradient(name)
        if shard is None:
            return
        row_length = self._shards.numel(name) // keep.numel()
        apply_row_mask_(shard.data, shard.start, row_length, keep.to(shard.data.device))
        self._shards.gradient_changed(name)

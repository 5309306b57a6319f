"""Output magnitudes of all tracked layers, added up while forward passes run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cl_dist.kernels import row_magnitude
from cl_dist.models.tracked import token_mask_of


class MagnitudeSums:
    """Hooks on the tracked layers that add their row magnitudes to one flat vector.

    Args:
        model: The model that the layers belong to.
        layers: By name, the tracked layers.
        per_token: L1-normalise every token's output before the sum (`kernels.row_magnitude`).
        count_padding: Count every token; otherwise those that `token_masks` marks.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Linear], per_token: bool = True, count_padding: bool = False
    ) -> None:
        self.sizes = [layer.out_features for layer in layers.values()]
        """Rows of each layer, in the order of `layers`."""
        device = next(iter(layers.values())).weight.device
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)
        """Sums of this rank since `clear`, all layers one after the other. A micro-batch's magnitudes are float32;
        their sum in double precision does not depend on the order, hence not on how micro-batches lie on ranks."""
        self.counting = False
        """Whether forward passes of training count."""
        self.token_masks: dict[str, torch.Tensor] = {}
        """The micro-batch's real tokens, bool `(batch, length)`, for "input" and "target" tokens."""
        self._per_token, self._count_padding = per_token, count_padding
        self.by_layer = dict(zip(layers, self.flat.split(self.sizes), strict=True))
        """Views of `flat` by layer name."""
        self._handles = [
            layer.register_forward_hook(self._recorder(self.by_layer[name], token_mask_of(name, model)))
            for name, layer in layers.items()
        ]

    def clear(self) -> None:
        """Start from zero."""
        self.flat.zero_()

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _recorder(self, sums: torch.Tensor, kind: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """Return the forward hook that adds one layer's magnitudes to `sums`."""

        def record(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            # A forward pass inside backward recomputes activations: those tokens were counted the first time.
            if not self.counting or not module.training or torch._C._current_graph_task_id() != -1:
                return
            sums.add_(row_magnitude(output, self._counted_tokens(kind, output), per_token=self._per_token))

        return record

    def _counted_tokens(self, kind: str, output: torch.Tensor) -> torch.Tensor | None:
        """Bool of the leading shape of `output`: the tokens that count, or None for all of them."""
        if self._count_padding:
            return None
        mask = self.token_masks[kind]
        # A classifier's head runs over one vector per sample: fillers have no real token and do not count.
        return mask.any(dim=1) if output.dim() == 2 else mask

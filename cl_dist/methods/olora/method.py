"""O-LoRA: the adapters that IncLoRA adds, kept orthogonal to the old ones by a penalty."""

from __future__ import annotations

from cl_dist.methods.inclora.method import IncLora
from cl_dist.methods.olora.config import OLoraConfig
from cl_dist.methods.olora.overlap import PastOverlap
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.lora import frozen_adapters


class OLora(IncLora):
    """IncLoRA whose new adapters are kept orthogonal to the old ones (arXiv 2310.14152).

    Args:
        config: The recipe's `method` entry.
    """

    def __init__(self, config: OLoraConfig) -> None:
        super().__init__(config)
        self.config: OLoraConfig

    def before_task(self, place: TaskPlace) -> None:
        """Lay the penalty out along the new adapter and the old ones, which are in place by now."""
        device = next(self._model.parameters()).device
        self._overlap = PastOverlap(self._model, self._shards, self.config.lambda1, self.config.lambda2, device)
        self._overlap.gather_past(frozen_adapters(self._model))

    def before_update(self) -> None:
        """Add the penalty's gradient."""
        self._overlap.add_gradient()

"""Gradients of whole weights of which only a part is trained, measured once: every rank keeps an even share of each."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch

from cl_dist.methods.protocol import Probe
from cl_dist.methods.shared.largest import largest, ranks_of
from cl_dist.models.kept_parts import KeptPart
from cl_dist.sharding import Shard
from cl_dist.sharding.maps import owned_piece, padded_piece
from cl_dist.tasks.types import Encoded


class WholeGradients:
    """Adds up over micro-batches and ranks what backward computes for whole weights, inside a `with` block.

    Each weight's gradient is reduced as soon as backward has it, so no rank holds more than one weight's, beside its
    own shares in float32.

    Args:
        parts: The parts whose weights' gradients are wanted; of elements.
    """

    def __init__(self, parts: Sequence[KeptPart]) -> None:
        self._parts = parts
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._pieces = {
            part.part.weight: torch.zeros(padded_piece(part.size, self._world), device=part.indices.device)
            for part in parts
        }
        self.measured = False
        """Whether the gradients are those of a measurement that was finite."""

    def __enter__(self) -> WholeGradients:
        """Watch every backward pass."""
        for part in self._parts:
            part.scorer = self._add
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        for part in self._parts:
            part.scorer = None

    def measure(self, probe: Probe, samples: Sequence[Encoded], what: str) -> None:
        """Take the gradient of the mean loss on `samples` (collective); see `Probe.gradient`.

        Raises:
            JobFailed: It is not finite, and no further measurement may be skipped.
        """
        for piece in self._pieces.values():
            piece.zero_()
        self.measured = probe.gradient(samples, lambda: None, mean=True, what=what)

    def largest(self) -> dict[str, torch.Tensor]:
        """The numbers of the elements with the largest gradient, as many as each part has (collective).

        Returns:
            By weight name `(Part.count,)` of the part's `index_dtype`, ascending, the same on all ranks.
        """
        shards = {part.part.weight: self._own(part) for part in self._parts}
        counts = {part.part.weight: part.part.count for part in self._parts}
        device = next(iter(self._pieces.values())).device
        cuts = largest(shards, counts, ranks_of(replicated=False, device=device))
        chosen = [cuts[name].keep(shard).nonzero()[:, 0] + shard.start for name, shard in shards.items()]
        # Every rank needs all numbers: each contributes its own, behind those of the ranks before it.
        table = torch.zeros(self._world, len(chosen), dtype=torch.int64, device=device)
        table[self._rank] = torch.tensor([len(numbers) for numbers in chosen], device=device)
        self._sum(table)
        behind = table[: self._rank].sum(0).tolist()
        found = {}
        for part, numbers, first in zip(self._parts, chosen, behind, strict=True):
            everyone = torch.zeros_like(part.indices)
            everyone[first : first + len(numbers)] = numbers.to(everyone.dtype)
            found[part.part.weight] = self._sum(everyone)
        return found

    def _add(self, part: KeptPart, grad: torch.Tensor) -> None:
        piece = self._pieces[part.part.weight]
        flat = torch.nn.functional.pad(grad.reshape(-1).float(), (0, len(piece) * self._world - part.size))
        if self._world > 1:
            own = torch.empty_like(piece)
            torch.distributed.reduce_scatter(own, list(flat.chunk(self._world)))
            flat = own
        piece.add_(flat)

    def _own(self, part: KeptPart) -> Shard:
        piece = self._pieces[part.part.weight]
        start, numel = owned_piece(part.size, len(piece), self._rank)
        return Shard(start, piece[:numel])

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

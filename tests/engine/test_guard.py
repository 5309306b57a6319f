from __future__ import annotations

import math
from typing import Any

import torch

from cl_dist.engine.guard import UpdateGuard
from tests.kernels.counting import Counting, OnDevice


def test_the_host_waits_once_for_the_losses_of_all_micro_batches() -> None:
    shards: Any = None  # not asked before the losses are known
    guard = UpdateGuard(shards, max_skipped=0)
    guard.begin("a step")
    with Counting() as seen:
        for value in (0.1, math.inf, 3.0):
            guard.note_loss(OnDevice(torch.tensor(value)), [0, -1])
        assert seen.waits == []
        assert guard.losses == [torch.tensor(0.1).item(), math.inf, 3.0]
        assert guard.losses[2] == 3.0
        assert len(seen.waits) == 1
        guard.begin("the next step")
        assert guard.losses == []

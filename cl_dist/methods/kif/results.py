"""What a task leaves in its folder, so that anyone can recompute its fusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cl_dist.methods.kif.units import UnitMap
from cl_dist.state.atomic import make_folder, replacing, write_text
from cl_dist.state.run_folder import TaskFolder


def write_scores(folder: Path, units: UnitMap, scores: Mapping[str, torch.Tensor]) -> None:
    """Write units.json (see `UnitMap.as_json`) and unit_scores.safetensors (`scores`, by name), in the same order.

    Raises:
        ClDistError: The disk is full; older files are intact.
    """
    make_folder(folder)
    write_text(TaskFolder(folder).units, units.as_text())
    with replacing(TaskFolder(folder).unit_scores) as temporary:
        save_file(dict(scores), temporary)

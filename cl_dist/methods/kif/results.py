"""What a task leaves in its folder, so that anyone can recompute its fusion."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cl_dist.methods.kif.units import UnitMap
from cl_dist.state.atomic import sync, telling_full_disk, write_text
from cl_dist.state.run_folder import TaskFolder


def write_scores(folder: Path, units: UnitMap, scores: Mapping[str, torch.Tensor]) -> None:
    """Write units.json (see `UnitMap.as_json`) and unit_scores.safetensors (`scores`, by name), in the same order.

    Raises:
        ClDistError: The disk is full; older files are intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(TaskFolder(folder).units, units.as_text())
    path = TaskFolder(folder).unit_scores
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with telling_full_disk(path):
        try:
            save_file(dict(scores), temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder)

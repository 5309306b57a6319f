"""Whether a model can be exported, as far as names show it. Imports no torch, so that a typo is answered at once."""

from __future__ import annotations

import os
from pathlib import Path

from cl_dist.config.schema import BUILTIN_FAMILIES
from cl_dist.errors import BadInput
from cl_dist.state.saved_models import SavedModel


def check_export(saved: SavedModel, out: Path, *, merge: bool) -> None:
    """Raise BadInput if the model cannot be exported like this, as far as names show it.

    Args:
        saved: The model.
        out: Where it would go.
        merge: Whether to merge an adapter into its base model.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: not a folder; allowed: a new or an empty one")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out}: not empty, and nothing is overwritten; allowed: a new or an empty folder")
    above = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadInput(f"{out}: cannot be created, because {above} is not a folder that you may write to")
    if merge and not saved.is_adapter:
        raise BadInput("--merge: this run trained the whole model and has no adapter to merge; leave it out")
    if saved.is_adapter and not merge and saved.recipe.model.name_or_path in BUILTIN_FAMILIES:
        raise BadInput(
            f"{saved.run.path}: the adapter's base model, {saved.recipe.model.name_or_path}, exists only in cl_dist, "
            "so nothing else could load the adapter; add --merge"
        )

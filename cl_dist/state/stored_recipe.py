"""The recipe that a run was started with, as `config.yaml` keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cl_dist.config.files import is_file
from cl_dist.config.plugins import PluginError, load_plugins
from cl_dist.config.schema import Recipe
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable
from cl_dist.state.stored_json import first_problem, read_stored

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)

CHANGED_DEFAULTS = ("model.attention", "eval.max_new_tokens")
"""Settings whose default was another one in an earlier release."""


def kept_defaults(config: Path) -> dict[str, Any]:
    """What a run that goes on keeps of `CHANGED_DEFAULTS`, by dotted key, unless it is given; nothing without a run."""
    if not is_file(config):
        return {}
    plain = as_plain(stored_recipe(config))
    return {key: plain[key.partition(".")[0]][key.partition(".")[2]] for key in CHANGED_DEFAULTS}


def stored_recipe(path: Path) -> Recipe:
    """Read a run's recipe; settings that it does not mention have their defaults.

    Raises `BadInput` where the file is missing or damaged.
    """
    try:
        data = parse_yaml(read_stored(path).decode("utf-8"), path.name)
        if isinstance(data, dict):
            load_plugins(data.get("plugins"), known=True)
        return _RECIPE.validate_python(data)
    except PluginError:  # the file is as it was written
        raise
    except CheckpointDamaged as error:
        raise BadInput(f"--resume: {error}, so the recipe cannot be compared") from error
    except StateUnusable as error:
        raise BadInput(str(error)) from error
    except ValidationError as error:
        raise BadInput(f"{path} is damaged: {first_problem(error, 'recipe')}") from error
    except (ValueError, BadInput) as error:
        raise BadInput(f"{path} is damaged: {' '.join(str(error).split())}") from error


def as_plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested mappings, lists and scalars."""
    plain: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return plain

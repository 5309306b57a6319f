"""Reading the files that a run has written: a damaged one is reported in one sentence, not with a traceback.

Recipes (`config.yaml`), metrics (`metrics.json`) and other JSON; `state.manifest` reads the manifest.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from cl_dist.config.files import is_file
from cl_dist.config.plugins import PluginError, load_plugins
from cl_dist.config.schema import Recipe
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.state.integrity import CheckpointDamaged, StateUnusable, patiently

MOST_BYTES = 1 << 28
"""More than any such file of a run has; a larger one is not read into memory."""


def read_stored(path: Path) -> bytes:
    """The content of a file of a run; I/O errors are retried for some seconds.

    Raises:
        CheckpointDamaged: It is missing or a folder.
        StateUnusable: It cannot be read.
        BadInput: It is not a regular file (reading a pipe would wait forever), or too large to be one of ours.
    """
    found = patiently(path, path.stat)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise BadInput(f"{path} is damaged: it is not a regular file")
    if found.st_size > MOST_BYTES:
        raise BadInput(f"{path} is damaged: it has {found.st_size} bytes, more than such a file ever has")
    return patiently(path, path.read_bytes)


def read_stored_text(path: Path) -> str:
    """Like `read_stored`, for UTF-8 text. Raises `BadInput` for any problem with the file."""
    try:
        return read_stored(path).decode("utf-8")
    except (CheckpointDamaged, StateUnusable) as error:
        raise BadInput(str(error)) from error
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `BadInput` if the file is missing, unreadable or holds anything else."""
    text = read_stored_text(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} is damaged: it is not a JSON object")
    return document


def first_problem(error: ValidationError, whole: str) -> str:
    """`key: what is wrong with it` for the first entry that pydantic rejects; `whole` names the file's content."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or whole
    return f"{where}: {first['msg']}"


class _Metrics(BaseModel):
    """The part of metrics.json that is read; it holds more."""

    model_config = ConfigDict(extra="allow", strict=True)

    accuracy_matrix: list[list[float | None]]
    tasks: list[str] | None = None
    average_performance: float | None = None
    backward_transfer: float | None = None
    forward_transfer_zero_shot: float | None = None
    forward_transfer_single: float | None = None
    forgetting: float | None = None
    learning_accuracy: float | None = None
    general_ability: float | None = None
    general_forgetting: float | None = None
    tokens_per_second: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> _Metrics:
        """Require a row per model and a score per task."""
        width = len(self.tasks) if self.tasks is not None else len(next(iter(self.accuracy_matrix), ()))
        if any(len(row) != width for row in self.accuracy_matrix):
            raise ValueError(f"a row of the accuracy matrix does not have {width} scores, one per task")
        if self.tasks is not None and len(self.accuracy_matrix) > len(self.tasks) + 1:
            raise ValueError(f"{len(self.accuracy_matrix)} rows of scores for {len(self.tasks)} tasks")
        return self


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json, with None for every missing metric. Raises `BadInput` if it is damaged."""
    document = read_object(path)
    try:
        return _Metrics.model_validate(document).model_dump()
    except ValidationError as error:
        raise BadInput(f"{path} is damaged: {first_problem(error, 'metrics')}") from error


_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)

CHANGED_DEFAULTS = ("model.attention", "eval.max_new_tokens")
"""Settings whose default differs from that of an earlier release."""


def kept_defaults(config: Path) -> dict[str, Any]:
    """The values of `CHANGED_DEFAULTS` in a run, by dotted key, which a resume keeps unless the user sets them.

    Empty if there is no run.
    """
    if not is_file(config):
        return {}
    plain = as_plain(stored_recipe(config))
    return {key: plain[key.partition(".")[0]][key.partition(".")[2]] for key in CHANGED_DEFAULTS}


def stored_recipe(path: Path) -> Recipe:
    """Read a run's recipe; settings that it does not mention have their defaults.

    Raises `BadInput` if the file is missing or damaged.
    """
    try:
        data = parse_yaml(read_stored(path).decode("utf-8"), path.name)
        if isinstance(data, dict):
            load_plugins(data.get("plugins"), known=True)
        return _RECIPE.validate_python(data)
    except PluginError:  # the file itself is intact
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

"""Which model a run has saved after which task, and the recipe that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import ModelConfig, Recipe
from cl_dist.config.words import did_you_mean
from cl_dist.errors import BadInput
from cl_dist.methods.config import Role
from cl_dist.state.inputs import moved_inputs
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder


@dataclass(frozen=True)
class SavedModel:
    """The model, or the adapter, that a run had after one of its tasks."""

    run: RunFolder
    manifest: Manifest
    recipe: Recipe
    """As it was trained, with paths as they are now."""
    recipe_dir: Path
    index: int
    """Position of the task, from 0."""

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.manifest.tasks[self.index]

    @property
    def learnt(self) -> tuple[str, ...]:
        """The tasks that the model was trained on, in order."""
        if any(Role.SINGLE in method.ROLES for method in self.recipe.method):
            return (self.task,)
        last, steps = self.index, [entry.get("steps") for entry in self.manifest.timings]
        while steps[last + 1 : last + 2] == [0]:  # multi_task: these were trained together with the first one
            last += 1
        return self.manifest.tasks[: last + 1]

    @property
    def folder(self) -> Path:
        """Weights or adapter, and tokenizer, in Hugging Face format."""
        return self.run.task(self.index, self.task).model

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter was saved, which the base model has to be loaded for."""
        return self.recipe.model.lora is not None

    @property
    def source(self) -> ModelConfig:
        """The settings that load the saved weights; of an adapter, those of its base model."""
        model = self.recipe.model
        return model if self.is_adapter else replace(model, name_or_path=str(self.folder), gguf_file=None)


def find_saved(run: Path, task: str | None = None, changes: Sequence[str] = (), option: str = "--task ") -> SavedModel:
    """The model after `task`, or after the last finished task.

    Args:
        run: Run folder.
        task: Name of a finished task.
        changes: Changes to the stored recipe, as in `load_recipe`.
        option: What precedes the task's name in a message.

    Raises:
        BadInput: There is no such run, or no such model yet; the message lists the finished tasks.
    """
    folder = RunFolder(run)
    manifest = Manifest.read(folder.manifest)
    index = saved_index(manifest, task, run, option)
    recipe, recipe_dir = load_recipe(str(folder.config), changes)
    return SavedModel(folder, manifest, where_it_is_now(recipe, manifest, run), recipe_dir, index)


def saved_index(manifest: Manifest, task: str | None, run: Path, option: str = "--task ") -> int:
    """Position of the task in whose folder the model after `task` is. Raises BadInput as `find_saved` does."""
    done = manifest.tasks[: manifest.completed]
    if not done:
        raise BadInput(f"{run}: no task is finished yet, so it has saved no model")
    if task is not None and task not in done:
        raise BadInput(
            f"{option}{task}: not a finished task of {run}; finished: {', '.join(done)}{did_you_mean(task, done)}"
        )
    index = len(done) - 1 if task is None else done.index(task)
    steps = [entry.get("steps") for entry in manifest.timings]
    while index > 0 and steps[index : index + 1] == [0]:  # multi_task: this task shares the previous task's model
        index -= 1
    return index


def where_it_is_now(recipe: Recipe, manifest: Manifest, run: Path) -> Recipe:
    """The recipe of a run that may have been moved since, with or without its data."""
    if manifest.inputs is not None:
        recipe = moved_inputs(recipe, manifest.inputs.places, run)
    return replace(recipe, output_dir=str(run))

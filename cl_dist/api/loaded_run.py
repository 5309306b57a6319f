"""A run folder as a Python object: its scores, its pictures and its models."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.report.reading import read_run
from cl_dist.state.manifest import Manifest
from cl_dist.state.saved_models import find_saved
from cl_dist.state.stored_files import read_metrics

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_run(path: str | os.PathLike[str]) -> LoadedRun:
    """Read a run, finished or not, from its folder (`output_dir`).

    Raises:
        BadInput: There is no run, or a file of it is damaged.
    """
    return LoadedRun(Path(path))


class LoadedRun:
    """What a run has recorded so far, as it was when the folder was read.

    `import cl_dist` and `load_run` import no torch; `model` does.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the run folder. Raises BadInput as `load_run` does."""
        self._data = read_run(path)
        self.path = path
        """The run folder."""

    @property
    def _manifest(self) -> Manifest:
        return self._data.manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the stream."""
        return self._manifest.tasks

    @property
    def completed(self) -> tuple[str, ...]:
        """Names of the tasks that are trained, evaluated and saved."""
        return self._data.done

    @property
    def status(self) -> str:
        """`running` (also a run that was killed), `interrupted`, `finished` or `failed`."""
        return self._manifest.status

    @property
    def recipe(self) -> Recipe:
        """The recipe that was run, with all defaults."""
        return load_recipe(str(self._data.folder.config))[0]

    @property
    def accuracy_matrix(self) -> pandas.DataFrame:
        """Scores as float64. Rows: the model after each task, from `untouched`; columns: the task it is scored on.

        NaN where the model was not scored. A run that has not finished has fewer rows.
        """
        import pandas

        rows = self._manifest.accuracy_matrix
        names = ["untouched", *self.tasks][: len(rows)]
        values = [[float("nan") if score is None else score for score in row] for row in rows]
        index = pandas.Index(names, name="after")
        return pandas.DataFrame(values, index=index, columns=pandas.Index(self.tasks, name="scored on"), dtype=float)

    @property
    def losses(self) -> pandas.DataFrame:
        """A row per optimiser step in order: `task`, `step` (from 1 in each task) and `loss`."""
        import pandas

        rows = [
            (task, step, loss)
            for task in self.tasks
            for step, loss in sorted(self._data.log.losses.get(task, {}).items())
        ]
        return pandas.DataFrame(rows, columns=["task", "step", "loss"])

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: average performance, forgetting, speed, memory (docs/commands.md lists them).

        Raises BadInput if the run has not finished.
        """
        if self.status != "finished":
            raise BadInput(
                f"{self.path} has finished {len(self.completed)} of {len(self.tasks)} tasks, and there are no metrics "
                "before the last one; accuracy_matrix has the scores so far"
            )
        return read_metrics(self._data.folder.metrics)

    def plot(self) -> Figure:
        """The accuracy matrix as a matplotlib figure, which a notebook shows. `cl-dist report` has more pictures.

        Raises BadInput if nothing is scored yet.
        """
        from cl_dist.report.pictures import accuracy_matrix

        if not self._manifest.accuracy_matrix:
            raise BadInput(f"{self.path}: nothing is scored yet, so there is nothing to plot")
        return accuracy_matrix(self.tasks, self._manifest.accuracy_matrix).figure()

    def model(self, task: str | None = None) -> PreTrainedModel | PeftModel:
        """The model after `task` (by default the last finished one), whole, on the CPU and in evaluation mode.

        A run with adapters gives the base model with the adapter on it.

        Raises:
            BadInput: The task is not finished, or model, data (a classifier's labels) or base model are gone.
        """
        from cl_dist.assembly import load_saved
        from cl_dist.config.objectives import FACTS
        from cl_dist.models.check import known_objective
        from cl_dist.tasks.encode import label_names
        from cl_dist.tasks.stream import load_stream

        saved = find_saved(self.path, task, option="task ")
        objective = known_objective(saved.recipe.model)
        labels = 0
        if objective is None or FACTS[objective].needs_labels:  # only the data has them
            labels = len(label_names(load_stream(saved.recipe.stream, saved.recipe_dir, saved.recipe.train)))
        return load_saved(saved.recipe, saved.folder, labels).model.eval()

    def tokenizer(self, task: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer of the model after `task`. Raises BadInput as `model` does."""
        from cl_dist.config.files import cache_folder
        from cl_dist.models.load import load_tokenizer

        return load_tokenizer(find_saved(self.path, task, option="task ").source, cache_folder())[0]

    def export(
        self,
        out: str | os.PathLike[str],
        task: str | None = None,
        *,
        merge: bool = False,
        notify: Callable[[str], None] = print,
    ) -> Path:
        """Write the model after `task` as a plain Hugging Face folder, as `cl-dist export` does; return the folder.

        Args:
            out: A new or an empty folder.
            task: A finished task; None: the last one.
            merge: Merge an adapter into its base model.
            notify: Called with a sentence about what is left out.

        Raises:
            BadInput: As `cl-dist export` (docs/export.md).
        """
        from cl_dist.export.folder import write_export

        write_export(find_saved(self.path, task, option="task "), Path(out), merge=merge, notify=notify)
        return Path(out)

    def __repr__(self) -> str:
        return f"<run {self.path}: {self.status}, {len(self.completed)} of {len(self.tasks)} tasks>"

    def _repr_html_(self) -> str:
        """What a notebook shows: one line, and the accuracy matrix."""
        table: str = self.accuracy_matrix.to_html(float_format="{:.4f}".format, na_rep="")
        return f"<p>{html.escape(repr(self))}</p>{table}"

"""MLflow: wherever `MLFLOW_TRACKING_URI` leads, by default where MLflow itself puts it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from cl_dist.config.yaml_text import render_yaml
from cl_dist.tracking.tracker import PROJECT, RunFacts, Tracker, leaves

MOST_PARAMETERS = 100
"""In one request."""
LONGEST = 500
"""Characters of a parameter's value that every server takes."""
ENDINGS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class _Mlflow(Tracker):
    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""

    @override
    def start(self, run: RunFacts) -> str | None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        client = self._client = MlflowClient()
        if run.identity is not None:
            self._id = run.identity
            client.update_run(self._id, status="RUNNING")
            return self._id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = client.create_run(number, run_name=run.folder.absolute().name).info.run_id
        settings = [Param(key, str(value)[:LONGEST]) for key, value in leaves(run.settings).items()]
        for start in range(0, len(settings), MOST_PARAMETERS):
            client.log_batch(self._id, params=settings[start : start + MOST_PARAMETERS])
        client.log_text(self._id, render_yaml(run.settings), "recipe.yaml")
        return self._id

    @override
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    @override
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        # The format of `mlflow.log_table`, which would need pandas and add rows to the old ones.
        self._client.log_dict(self._id, {"columns": list(columns), "data": [list(row) for row in rows]}, f"{name}.json")

    @override
    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, ENDINGS[status])


def tracker() -> Tracker:
    """A new tracker."""
    return _Mlflow()

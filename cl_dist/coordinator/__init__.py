"""Steps through the stream: train a task, evaluate, save, continue. Knows tasks, not tensors.

Every rank runs the same coordinator in one process group; only rank 0 writes the JSON files of the run folder. State is
on the disk before the manifest names it, so after a kill at any moment the manifest names the latest complete state.

`run.py` joins the ranks and finds out where the run stands, `stream.py` steps through the tasks and ends with the
metrics, `task_state.py` saves and restores the current task, `scoring.py` scores the model in training, or a saved one.
"""

from cl_dist.coordinator.run import run
from cl_dist.coordinator.scoring import evaluate

__all__ = ["evaluate", "run"]

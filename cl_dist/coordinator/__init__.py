"""Steps through the stream: train a task, evaluate, save, go on. Knows tasks, not tensors.

Every rank runs the same coordinator in one process group; rank 0 alone writes the run folder's JSON files. What is
saved is saved before the manifest says so: after a kill at any moment the manifest names the newest state that is
whole.

`run.py` joins the ranks and finds out where the run stands, `stream.py` steps through the tasks, `task_state.py` saves
and restores the one under way, `scoring.py` fills the accuracy matrix, `finish.py` tells the results, `saved.py` scores
a model that is on the disk.
"""

from cl_dist.coordinator.run import run
from cl_dist.coordinator.saved import evaluate

__all__ = ["evaluate", "run"]

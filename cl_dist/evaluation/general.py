"""General ability of the run's model: tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness is an optional dependency, imported only if a recipe uses it. It evaluates the live model inside the engine,
without exporting it and without a second copy of the weights, even under ZeRO-3 (`cl_dist.evaluation.harness`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_dist.config.schema import GeneralConfig
from cl_dist.errors import BadInput, ClDistError
from cl_dist.evaluation.metrics import UNTOUCHED

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

NORMALISED = "acc_norm"
"""Accuracy by likelihood per byte, the published metric for HellaSwag and ARC."""


@dataclass(frozen=True)
class GeneralScore:
    """The harness's result for one task, the same on every rank."""

    task: str
    score: float
    """Higher is better: `acc_norm` if the task has it, or the first metric in its file, negated if lower is better."""
    metric: str
    """Name of the metric that `score` is."""
    metrics: Mapping[str, float]
    """All metrics by the harness's names (`metric,filter`)."""
    samples: int
    """Number of scored documents; 0 if the harness does not report it (groups)."""


def check_available(config: GeneralConfig) -> None:
    """Raise `BadInput` if the harness is not installed or the folder of the user's tasks does not exist.

    Imports neither torch nor the harness.
    """
    if find_spec("lm_eval") is None:
        raise BadInput(
            "eval.general: lm-evaluation-harness is not installed; install it (pip install 'cl-dist[general]'), or "
            "leave eval.general out"
        )
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise BadInput(
            f"eval.general.include_path: {config.include_path} is not a folder; it must be one with task files (YAML)"
        )


def is_due(config: GeneralConfig, place: str, tasks: Sequence[str]) -> bool:
    """Whether general ability is measured at `place`: `untouched`, or the name of a task of the stream."""
    if config.after == "all" or place in config.after:
        return True
    ends = {"first": tasks[0], "last": tasks[-1]}
    return place != UNTOUCHED and any(ends.get(wanted) == place for wanted in config.after)


@dataclass(frozen=True)
class HarnessTasks:
    """The tasks that the harness has loaded."""

    manager: Any
    """Its index of tasks. Without it, the harness would read thousands of files at every evaluation."""
    loaded: Mapping[str, Any]
    """Task objects, data included, by the names in the recipe."""


def load_harness_tasks(config: GeneralConfig) -> HarnessTasks:
    """Find and load the tasks that the recipe names.

    Raises `BadInput` for a name that the harness does not know, for a task that runs code if the recipe does not allow
    that, and for a task whose files or data cannot be loaded.
    """
    check_available(config)
    manager = _manager(config)
    if config.confirm_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric also checks this
    return HarnessTasks(manager, {name: _load(manager, name, config) for name in config.tasks})


def _manager(config: GeneralConfig) -> Any:
    """The harness's index of tasks, without its own thousands of files if the user's folder has all tasks."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        if config.include_path is not None:
            own = TaskManager(include_path=config.include_path, include_defaults=False)
            if set(config.tasks) <= set(own.all_tasks):
                return own
        manager = TaskManager(include_path=config.include_path)
    for name in config.tasks:
        if name not in manager.all_tasks:
            where = "" if config.include_path is None else f", and neither does {config.include_path}"
            raise BadInput(f"eval.general.tasks: lm-evaluation-harness has no task {name!r}{where}")
    return manager


def _load(manager: Any, name: str, config: GeneralConfig) -> Any:
    """Load one task or group. Its `unsafe_code` is checked before any of its files is executed."""
    consent = config.confirm_unsafe_code
    if not consent and (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise _runs_code(name)
    try:
        with _quiet():
            loaded = manager.load([name])
    except ClDistError:  # a request to stop
        raise
    except Exception as error:  # data sets, task files and their Python code raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"eval.general.tasks: {name} cannot be loaded: {reason}") from error
    if not consent and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
        raise _runs_code(name)
    return loaded


def _runs_code(name: str) -> BadInput:
    return BadInput(
        f"eval.general.tasks: {name} executes code that the model has written, without a sandbox; if you accept that "
        "on this machine, set eval.general.confirm_unsafe_code: true"
    )


class GeneralEvaluator:
    """Scores the live model; all ranks call it with the same tasks in the same order.

    `tasks` come from `load_harness_tasks`; `synced` says that the weights are sharded over the ranks (ZeRO-3); `date`
    is `train.date`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tasks: HarnessTasks,
        config: GeneralConfig,
        batch_size: int,
        synced: bool,
        date: str,
    ) -> None:
        self._model, self._tokenizer, self._tasks, self._config = model, tokenizer, tasks, config
        self._batch_size = config.batch_size or batch_size
        self._synced, self._date = synced, date

    def evaluate(self, name: str) -> list[GeneralScore]:
        """Score one task, group or tag (collective); a tag, or a group without its own score, gives one per task."""
        from lm_eval import simple_evaluate

        from cl_dist.evaluation.harness import LiveModel, from_first_rank
        from cl_dist.evaluation.inference import evaluating

        loaded = self._tasks.loaded[name]
        parts = [*loaded["tasks"].values()]
        with evaluating(self._model), _quiet():
            results = simple_evaluate(
                model=LiveModel(self._model, self._tokenizer, self._batch_size, self._synced, self._date),
                tasks=[loaded["groups"][name]] if name in loaded["groups"] else parts,
                task_manager=self._tasks.manager,
                num_fewshot=self._config.num_fewshot,
                limit=self._config.limit,
                apply_chat_template=self._config.chat_template,
                confirm_run_unsafe_code=self._config.confirm_unsafe_code,
                log_samples=False,
                bootstrap_iters=0,
                # Do not let the harness reseed the global random number generators.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        # Only the first process on a machine gets results from the harness.
        return from_first_rank([] if results is None else _scores(results, name, loaded["tasks"]))


def _scores(results: Mapping[str, Any], name: str, parts: Iterable[str]) -> list[GeneralScore]:
    """The score of the name in the recipe, or else those of its parts."""
    found = {key: score for key in (name, *parts) if (score := read_score(results, key)) is not None}
    return [found[name]] if name in found else list(found.values())


def read_score(results: Mapping[str, Any], name: str) -> GeneralScore | None:
    """The score of one task in the harness's results; None if they contain no metric for it."""
    entry = results["results"].get(name, {})
    metrics = {
        key: float(value)
        for key, value in entry.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    if not metrics:
        return None
    chosen = next((key for key in metrics if key.startswith(f"{NORMALISED},")), next(iter(metrics)))
    metric = chosen.partition(",")[0]
    higher = results.get("higher_is_better", {}).get(name, {}).get(metric)
    score = -metrics[chosen] if higher is False else metrics[chosen]
    samples = int(results.get("n-samples", {}).get(name, {}).get("effective", 0))
    return GeneralScore(name, score, metric, metrics, samples)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the harness's log and progress bars; some of them have no option for that."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)

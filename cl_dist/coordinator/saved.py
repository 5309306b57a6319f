"""Scoring a model that a run has saved."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from cl_dist.assembly import build_saved
from cl_dist.config.schema import Recipe
from cl_dist.engine.distributed import join, leave
from cl_dist.engine.quiet import quiet_libraries
from cl_dist.evaluation.result import write_predictions
from cl_dist.progress import Reporter
from cl_dist.state.atomic import write_json
from cl_dist.state.run_folder import RunFolder


def evaluate(recipe: Recipe, recipe_dir: Path, *, task_index: int, reporter: Reporter) -> dict[str, float]:
    """Score the model that the run in `recipe.output_dir` saved after task `task_index`, on every task of the recipe.

    The scores are also written to evaluation.json in the task's folder. The model is loaded whole on every rank.

    Raises:
        BadInput: The saved model or the data is not usable.
    """
    rank, _ = join(recipe.launch.timeout_seconds)
    quiet_libraries(rank)
    folder = RunFolder(Path(recipe.output_dir)).task(task_index, recipe.stream.tasks[task_index].name)
    tasks, evaluator, notices = build_saved(recipe, recipe_dir, folder.model)
    for notice in notices:
        if notice.on_screen:
            reporter.message(notice.text)
    split = {task.name: task.scored_on for task in tasks}
    scores: dict[str, float] = {}
    for result in chain.from_iterable(map(evaluator.evaluate, evaluator.passes(tasks))):
        scores[result.task] = result.score
        reporter.message(
            f"{result.task}: {result.score:.4f} ({result.metric} of {result.count} {split[result.task]} samples, "
            f"by {result.mode})"
        )
        if rank == 0:
            write_predictions(folder.path / "evaluation" / f"{result.task}.jsonl", result.predictions)
    if rank == 0:
        write_json(folder.path / "evaluation.json", scores)
    leave()
    return scores

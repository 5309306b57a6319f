"""What the trackers' own files hold after a run that was killed and resumed, read by the libraries themselves."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_dist import Recipe
from cl_dist.errors import BadInput
from cl_dist.tracking.tracker import RunFacts, check_trackers, make_tracker
from tests.recipes import write_recipe
from tests.zygote import Zygote

NAMES = ("tensorboard", "wandb", "mlflow")
INSTALLED = [name for name in NAMES if find_spec(name) is not None and (name != "mlflow" or find_spec("sqlalchemy"))]
STEPS = 4
"""Of each of two tasks."""


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed: it is too large for the lock")


@pytest.fixture(scope="module")
def folder(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run was asked to stop in its second task, and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = {"launch": {"processes": 1}, "train": {"micro_batch_size": 8}, "method": {"name": "migu"}}
    path = write_recipe(folder, track=INSTALLED, **settings)
    variables = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    stopped = {"moment": "stop", "on_rank": 0, "count": STEPS + 2}
    first = zygote.run(["run", str(path)], folder, fault=stopped, environment=variables)
    assert first.codes == [75], first.output
    second = zygote.run(["run", str(path), "--resume"], folder, environment=variables)
    assert second.codes == [0], second.output
    assert "no tracking" not in first.output[0] + second.output[0]
    return folder


def logged(folder: Path) -> dict[int, float]:
    """Training loss by step of the whole stream, from log.jsonl; of repeated steps the last one."""
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    first = {"spring": 0, "summer": STEPS}
    return {first[each["task"]] + each["step"]: each["loss"] for each in records if each["event"] == "step"}


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "metrics.json").read_text())
    return found


def test_tensorboard(folder: Path) -> None:
    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    losses = [(each.step, each.value) for each in events.Scalars("train/loss")]
    wanted = logged(folder)
    assert [step for step, _ in losses] == list(range(1, 2 * STEPS + 1)), "a repeated step counts once"
    assert dict(losses) == pytest.approx(wanted, rel=2**-23), "TensorBoard keeps float32"
    assert [each.value for each in events.Scalars("train/learning_rate")] == pytest.approx([1e-3] * 2 * STEPS)
    assert all(each.value > 0 for each in events.Scalars("train/tokens_per_second"))
    of_run, matrix = metrics(folder), metrics(folder)["accuracy_matrix"]
    ends = {"accuracy/spring": 0, "accuracy/summer": 1}
    for name, column in ends.items():
        scores = {each.step: each.value for each in events.Scalars(name)}
        assert scores == pytest.approx({STEPS: matrix[1][column], 2 * STEPS: matrix[2][column]})
    forgetting = {each.step: each.value for each in events.Scalars("stream/forgetting")}
    assert forgetting == pytest.approx({2 * STEPS: of_run["forgetting"]})
    kept = {each.step: each.value for each in events.Scalars("stream/kept_share")}
    assert kept == pytest.approx({STEPS: of_run["kept_share"]["spring"], 2 * STEPS: of_run["kept_share"]["summer"]})
    assert [each.value for each in events.Scalars("stream/restarts")] == [0, 1]
    table = events.Tensors("accuracy_matrix/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == "| after | spring | summer |"
    assert table.splitlines()[-1] == f"| summer | {matrix[2][0]:.4f} | {matrix[2][1]:.4f} |"


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run. Their messages are W&B's own; the log around them is LevelDB's, in blocks of
    32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@needs("wandb")
def test_wandb_offline(folder: Path) -> None:
    runs = sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in runs}) == 1, "the resume continues the same run"
    assert len(runs) == 2
    history = []
    for file in runs:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                history.append({name: json.loads(value) for name, value in values.items()})
    losses = {int(each["step"]): each["train/loss"] for each in history if "train/loss" in each}
    assert losses == logged(folder)
    assert [each for each in history if "accuracy_matrix/nrows" in each][-1]["accuracy_matrix/nrows"] == 3


@needs("mlflow")
def test_mlflow(folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("cl_dist").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["train.learning_rate"] == "0.001"
    losses = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == logged(folder)
    assert run.data.metrics["stream/restarts"] == 1


def test_repeated_steps_replace_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """A killed run repeats the steps after its checkpoint, and has perhaps taken more than it will."""
    identity = None
    for steps, offset in (((1, 2, 3, 4, 5), 0.0), ((3, 4), 10.0)):
        tracker = make_tracker("tensorboard")
        identity = tracker.start(RunFacts(tmp_path, {"train": {"epochs": 1}}, identity))
        for step in steps:
            tracker.scalars({"train/loss": step + offset}, step)
        tracker.finish("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 13), (4, 14)]
    assert "epochs: 1" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_tracker_that_fails_does_not_stop_the_run(zygote: Zygote, tmp_path: Path) -> None:
    """A resume may add a tracker; this one finds a file where its folder should be."""
    stream = {"tasks": [{"name": "spring", "format": "builtin"}], "max_train_samples": 16}
    path = write_recipe(tmp_path, stream=stream, method={"name": "sequential"})
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault={"moment": "stop", "on_rank": 1, "count": 1})
    assert outcome.codes == [75, 75], outcome.output
    (tmp_path / "run" / "tensorboard").touch()
    outcome = zygote.run(["run", str(path), "--resume", "--set=track=[tensorboard]"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    warnings = [line for line in outcome.output[0].splitlines() if "no tracking by tensorboard from here on: " in line]
    assert len(warnings) == 1, outcome.output[0]
    assert "no tracking" not in outcome.output[1]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [each["tracker"] for each in log if each["event"] == "tracker_failed"] == ["tensorboard"]


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_not_there_is_named_at_the_start(name: str) -> None:
    if find_spec(name) is not None:
        check_trackers([name])
        return
    message = f"track: {name} is not installed; run `pip install 'cl-dist\\[{name}\\]'`, or leave {name} out of track"
    with pytest.raises(BadInput, match=message):
        check_trackers([name])


def test_a_tracker_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match='track: "wandb" is given twice'):
        Recipe.load("quickstart", track=["wandb", "mlflow", "wandb"])
    with pytest.raises(BadInput, match="track"):
        Recipe.load("quickstart", track=["neptune"])

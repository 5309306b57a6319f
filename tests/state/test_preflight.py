from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from cl_dist.config.schema import (
    CheckpointConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    Recipe,
    StreamConfig,
    TaskConfig,
    TrainConfig,
    ZeroConfig,
)
from cl_dist.errors import BadInput
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import Manifest
from cl_dist.state.preflight import changed_settings, preflight, set_aside
from cl_dist.state.run_folder import RunFolder

RECIPE = Recipe(
    model=ModelConfig(name_or_path="builtin:llama-tiny"),
    stream=StreamConfig(tasks=(TaskConfig(name="a", format="builtin"), TaskConfig(name="b", format="builtin"))),
    output_dir="unused",
)


def make_run(path: Path, status: str = "interrupted") -> RunFolder:
    """A run of RECIPE with one of two tasks done."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    folder.config.write_text(yaml.safe_dump(TypeAdapter(Recipe).dump_python(RECIPE, mode="json")))
    Manifest(tasks=("a", "b"), world_size=2, zero_stage=2, completed=1, status=status).write(folder.manifest)  # type: ignore[arg-type]
    return folder


def edit_config(folder: RunFolder, **settings: object) -> None:
    folder.config.write_text(yaml.safe_dump(yaml.safe_load(folder.config.read_text()) | settings))


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    preflight(tmp_path / "a" / "b", RECIPE, resume=False, fresh=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("fresh", [False, True])
def test_an_empty_folder_may_be_used(tmp_path: Path, fresh: bool) -> None:
    preflight(tmp_path, RECIPE, resume=False, fresh=fresh)


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "finished"])
def test_a_run_may_be_resumed_whatever_became_of_it(tmp_path: Path, status: str) -> None:
    make_run(tmp_path, status)
    preflight(tmp_path, RECIPE, resume=True, fresh=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_first_manifest_starts_again(tmp_path: Path, resume: bool) -> None:
    folder = make_run(tmp_path)
    folder.manifest.rename(tmp_path / ".manifest.json.tmp-123")
    folder.lock.write_text("")
    folder.logs.mkdir()
    (folder.logs / ".heartbeat-rank0.json").write_text("{}")
    preflight(tmp_path, RECIPE, resume=resume, fresh=False)


def test_a_folder_that_a_slurm_job_was_submitted_from_holds_no_run_yet(tmp_path: Path) -> None:
    (tmp_path / "slurm" / "01").mkdir(parents=True)
    (tmp_path / "slurm" / "01" / "job.sh").write_text("")
    preflight(tmp_path, RECIPE, resume=False, fresh=False)
    (tmp_path / ".lock").write_text("")  # killed before its first manifest
    preflight(tmp_path, RECIPE, resume=False, fresh=False)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="but no manifest"):
        preflight(tmp_path, RECIPE, resume=False, fresh=False)


def test_settings_that_change_no_result_may_differ(tmp_path: Path) -> None:
    make_run(tmp_path)
    recipe = replace(
        RECIPE,
        launch=LaunchConfig(processes=8),
        output_dir="elsewhere",
        checkpoint=CheckpointConfig(every_steps=3),
        eval=EvalConfig(batch_size=64),
        zero=ZeroConfig(stage=3, offload=True),
        train=TrainConfig(micro_batch_size=2, gradient_accumulation=4),
    )
    preflight(tmp_path, recipe, resume=True, fresh=False)


def test_a_config_of_an_older_release_gets_the_defaults(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit_config(folder, train={"learning_rate": 1e-4})
    preflight(tmp_path, RECIPE, resume=True, fresh=False)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            replace(RECIPE, train=TrainConfig(learning_rate=0.5, seed=1)),
            "train.learning_rate: 0.0001 in the run, 0.5 now; train.seed: 42 in the run, 1 now; only launch,",
        ),
        (
            replace(RECIPE, stream=StreamConfig(tasks=RECIPE.stream.tasks[:1])),
            "stream.tasks[1].name: 'b' in the run, not set now",
        ),
        (replace(RECIPE, method=(MiguConfig(name="migu"),)), "method[0].name: 'sequential' in the run, 'migu' now"),
        (replace(RECIPE, eval=EvalConfig(mode="generate")), "eval.mode: 'auto' in the run, 'generate' now"),
    ],
)
def test_a_changed_recipe_is_refused_with_what_changed(tmp_path: Path, recipe: Recipe, message: str) -> None:
    make_run(tmp_path)
    with pytest.raises(BadInput) as caught:
        preflight(tmp_path, recipe, resume=True, fresh=False)
    assert message in str(caught.value)


def test_another_number_of_ranks_may_resume_where_it_divides_the_global_batch(tmp_path: Path) -> None:
    """The run of RECIPE on two ranks has a global batch of 16 samples."""
    folder = make_run(tmp_path)
    for ranks in (1, 2, 4, 8, 16):
        preflight(tmp_path, RECIPE, resume=True, fresh=False, world_size=ranks)
    for ranks in (3, 32):
        with pytest.raises(BadInput, match=rf"batch of 16 samples, which {ranks} ranks cannot share evenly"):
            preflight(tmp_path, RECIPE, resume=True, fresh=False, world_size=ranks)
    replace(Manifest.read(folder.manifest), status="finished", completed=2).write(folder.manifest)
    preflight(tmp_path, RECIPE, resume=True, fresh=False, world_size=3)


def test_many_differences_are_cut_short(tmp_path: Path) -> None:
    make_run(tmp_path)
    train = TrainConfig(
        epochs=9, learning_rate=9, weight_decay=9, beta1=0.5, beta2=0.5, eps=9, warmup_steps=9, max_length=99, clip=9,
        seed=9,
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"max_length: 512 in the run, 99 now; and 2 more; only"):
        preflight(tmp_path, replace(RECIPE, train=train), resume=True, fresh=False)


def test_changed_settings_of_plain_dicts() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": {}, "launch": {"processes": 1}}
    new = {"a": {"b": 1, "c": [1, 3]}, "d": {"e": None}, "launch": {"processes": 2}}
    assert changed_settings(old, new) == [
        "a.c[1]: 2 in the run, 3 now",
        "d.e: not set in the run, None now",
    ]
    assert changed_settings(old, old) == []


def test_a_path_that_leaves_the_files_below_it_no_room_is_refused(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a" * 100] * 36)
    with pytest.raises(
        BadInput, match=r"^output_dir .* is a path of \d+ bytes; allowed: at most 3500, since the files in it"
    ):
        preflight(deep, RECIPE, resume=False, fresh=False)
    assert not (tmp_path / ("a" * 100)).exists()
    preflight(deep.parents[4], RECIPE, resume=False, fresh=False)


def test_raw_settings_of_the_shards_may_differ_on_resume_and_no_others() -> None:
    """Like the stage, they only change how a step is executed, and some apply to one stage only."""
    none: dict[str, Any] = {"zero": {"deepspeed": {}}}
    buckets = {"zero": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 500}}}}
    assert changed_settings(none, buckets) == changed_settings(buckets, none) == []
    precision = {"zero": {"deepspeed": {"communication_data_type": "bf16"}}}
    assert changed_settings(none, precision) == [
        "zero.deepspeed.communication_data_type: not set in the run, 'bf16' now"
    ]


def no_run(path: Path) -> None:
    path.rmdir()


def empty(path: Path) -> None:
    pass


def a_file(path: Path) -> None:
    path.rmdir()
    path.write_text("")


def below_a_file(path: Path) -> None:
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_text("")


def dangling_link(path: Path) -> None:
    path.rmdir()
    path.symlink_to(path.parent / "nowhere")


def someones_folder(path: Path) -> None:
    (path / "thesis.tex").write_text("")


def someones_config(path: Path) -> None:
    (path / "config.yaml").write_text("")


def run_without_config(path: Path) -> None:
    make_run(path).config.unlink()


def damaged_config(path: Path) -> None:
    make_run(path).config.write_text("model: [")


def config_with_tag(path: Path) -> None:
    make_run(path).config.write_text("model: !!python/object/apply:os.getpid []")


def config_of_newer_release(path: Path) -> None:
    edit_config(make_run(path), telescope=1)


def config_is_a_list(path: Path) -> None:
    make_run(path).config.write_text("[1]")


def binary_config(path: Path) -> None:
    make_run(path).config.write_bytes(b"\xff\xfe\x00")


def run(path: Path) -> None:
    make_run(path)


def damaged_manifest(path: Path) -> None:
    make_run(path).manifest.write_text('{"tasks": [')


def newer_manifest(path: Path) -> None:
    folder = make_run(path)
    folder.manifest.write_text(json.dumps({"format_version": 7, "cl_dist_version": "3.0"}))


def manifest_is_a_folder(path: Path) -> None:
    folder = make_run(path)
    folder.manifest.unlink()
    folder.manifest.mkdir()


BAD_FOLDERS: list[tuple[Callable[[Path], None], str, str]] = [
    (
        run,
        "",
        r"holds a run already \(1 of 2 tasks done\): continue it with --resume, or put it aside with --fresh and start",
    ),
    (run, "resume fresh", "--resume and --fresh exclude each other"),
    (no_run, "resume", "--resume: .*/runs/x holds no run; leave --resume out"),
    (empty, "resume", "--resume: .*/runs/x holds no run; leave --resume out"),
    (a_file, "", "output_dir .*/runs/x is a file; it must be a folder"),
    (a_file, "resume", "output_dir .*/runs/x is a file; it must be a folder"),
    (below_a_file, "", "output_dir .*/runs/x cannot be created: Not a directory"),
    (dangling_link, "", "output_dir .*/runs/x cannot be created: File exists"),
    (someones_folder, "", r"holds thesis\.tex but no manifest\.json, so it is not a run folder"),
    (someones_folder, "fresh", r"holds thesis\.tex but no manifest\.json, so it is not a run folder"),
    (someones_folder, "resume", r"holds thesis\.tex but no manifest\.json, so it is not a run folder"),
    (someones_config, "", r"holds config\.yaml but no manifest\.json, so it is not a run folder"),
    (run_without_config, "resume", r"--resume: .*config\.yaml is missing, so the recipe cannot be compared"),
    (damaged_config, "resume", r"config\.yaml is damaged: config\.yaml, line 1: expected the node content"),
    (config_with_tag, "resume", r"config\.yaml is damaged: config\.yaml, line 1: the tag .* is not allowed"),
    (config_of_newer_release, "resume", r"config\.yaml is damaged: telescope: Unexpected keyword argument"),
    (config_is_a_list, "resume", r"config\.yaml is damaged: recipe: "),
    (binary_config, "resume", r"config\.yaml is damaged: "),
    (damaged_manifest, "resume", r"manifest\.json is damaged: Expecting value"),
    (damaged_manifest, "", r"manifest\.json is damaged: Expecting value"),
    (newer_manifest, "resume", r"manifest\.json has format 7, written by cl_dist 3\.0"),
    (manifest_is_a_folder, "resume", r"manifest\.json is a folder: .*/runs/x holds no run"),
]


CASES = [pytest.param(*case, id=f"{case[0].__name__} {case[1]}") for case in BAD_FOLDERS]


@pytest.mark.parametrize(("make", "flags", "message"), CASES)
def test_a_bad_run_folder_is_refused(tmp_path: Path, make: Callable[[Path], None], flags: str, message: str) -> None:
    output_dir = tmp_path / "runs" / "x"
    output_dir.mkdir(parents=True)
    make(output_dir)
    with pytest.raises(BadInput, match=message) as caught:
        preflight(output_dir, RECIPE, resume="resume" in flags, fresh="fresh" in flags)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_mistyped_folder_is_not_made_by_resume(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        preflight(tmp_path / "typo", RECIPE, resume=True, fresh=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", ["resume", "fresh", ""])
def test_a_run_in_use_is_refused(tmp_path: Path, flags: str) -> None:
    folder = make_run(tmp_path)
    with RunLock(folder.lock), pytest.raises(BadInput, match=f"in use by process {os.getpid()} on"):
        preflight(tmp_path, RECIPE, resume="resume" in flags, fresh="fresh" in flags)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="/proc, which no user may write to, is not there")
@pytest.mark.parametrize(("path", "message"), [("/proc/self", "is not writable"), ("/proc/x/y", "cannot be created")])
def test_a_folder_that_cannot_be_written_is_refused(path: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"output_dir {path} {message}: "):
        preflight(Path(path), RECIPE, resume=False, fresh=False)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_impossible_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="cannot be created"):
        preflight(tmp_path / name, RECIPE, resume=False, fresh=False)


def test_fresh_loses_nothing(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    make_run(output_dir)
    preflight(output_dir, RECIPE, resume=False, fresh=True)
    first = set_aside(output_dir)
    make_run(output_dir)
    second = set_aside(output_dir)
    assert first is not None
    assert second is not None
    assert first != second
    assert not output_dir.exists()
    for old in (first, second):
        assert old.name.startswith("run.old-")
        assert Manifest.read(old / "manifest.json").completed == 1
    assert set_aside(output_dir) is None


def test_fresh_puts_a_damaged_run_aside(tmp_path: Path) -> None:
    damaged_manifest(tmp_path / "run")
    preflight(tmp_path / "run", RECIPE, resume=False, fresh=True)
    assert set_aside(tmp_path / "run") is not None


def test_a_run_in_use_is_not_put_aside(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with RunLock(folder.lock), pytest.raises(BadInput, match="in use"):
        set_aside(folder.path)
    assert folder.manifest.exists()


def test_a_relative_path_is_put_aside_beside_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    moved = set_aside(Path("."))
    assert moved is not None
    assert moved.parent == tmp_path
    assert moved.name.startswith("run.old-")
    shutil.rmtree(moved)

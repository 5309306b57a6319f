"""Every kind of bad input to the real command, and the resulting message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.state.manifest import Manifest
from tests.cli.conftest import Command

RECIPE = """\
model:
  name_or_path: builtin:llama-tiny
stream:
  tasks:
    - {name: spring, format: builtin}
    - {name: mine, format: jsonl, path: mine}
"""

BAD_SETTINGS = [
    ("eval.mode=perplexity", "eval.mode perplexity: task "),
    ("model.objective=masked_lm", "model.objective: builtin:llama-tiny is of the decoder family"),
    ("stream.order=9", "stream.tasks: a stream has either tasks or an order; both are given"),
    ("train.epohcs=3", "train.epohcs: unknown key; did you mean epochs?"),
    ("learning_rate=1e-3", "learning_rate: unknown key; did you mean train.learning_rate?"),
    ("train.zzz=1", "train.zzz: unknown key; known here: epochs, max_steps_per_task, micro_batch_size"),
    ("x.y=1", "x: unknown key; known here: model, stream, method, train"),
    ("train.epochs=0", "train.epochs: 0 is not allowed; allowed: a whole number, at least 1"),
    ("train.epochs=1.5", "train.epochs: 1.5 is not allowed; allowed: a whole number, at least 1"),
    ("train.epochs='3'", 'train.epochs: "3" is not allowed; allowed: a whole number, at least 1'),
    ("train.epochs=true", "train.epochs: true is not allowed; allowed: a whole number"),
    ("train.shuffle=yes", 'train.shuffle: "yes" is not allowed; allowed: true or false'),
    ("train.learning_rate=0", "train.learning_rate: 0 is not allowed; allowed: a number, above 0"),
    ("train.learning_rate=.nan", "train.learning_rate: NaN is not allowed; allowed: a number, above 0"),
    ("train.clip=-1", "train.clip: -1 is not allowed; allowed: a number, above 0, or null"),
    ("train.beta1=1", "train.beta1: 1 is not allowed; allowed: a number, at least 0, below 1"),
    ("train.dtype=float16", 'train.dtype: "float16" is not allowed; allowed: float32, bfloat16'),
    ("train.seed=-1", "train.seed: -1 is not allowed; allowed: a whole number, at least 0, below 2147483648"),
    ("train=3", "train: 3 is not a mapping of settings"),
    ("model=null", "model: null is not a mapping of settings"),
    ("model={}", "model.name_or_path: missing; give a string: A built-in tiny model"),
    ("model.lora.target_modules=q", 'model.lora.target_modules: "q" is not allowed; allowed: a list of strings, or'),
    ("model.lora.dropout=1", "model.lora.dropout: 1 is not allowed; allowed: a number, at least 0, below 1"),
    ("eval.general={tasks: []}", "eval.general.tasks: "),
    ("eval.general={tasks: [a, a]}", 'eval.general.tasks: "a" is given twice'),
    ("eval.general={tasks: [a], after: [autumn]}", 'eval.general.after: "autumn" is none of all, untouched, first'),
    ("stream.tasks.0.streaming=true", "stream.tasks.0.streaming: true is read by formats auto and huggingface only"),
    ("stream.tasks.0.text_field=t", 'stream.tasks.0.text_field: "t" is read by formats auto, huggingface and jsonl'),
    ("train.template=prose", 'train.template: "prose" is not allowed; allowed: none, chat'),
    ("model.name_or_path=builtin:gpt-tiny", "model.name_or_path: there is no built-in model builtin:gpt-tiny; allowed"),
    ("model.name_or_path=./absent", "model.name_or_path: there is no folder absent"),
    ("model.gguf_file=m.gguf", "model.gguf_file: is m.gguf, but builtin:llama-tiny is built in"),
    ("model.objective=seq2seq_lm", "model.objective: builtin:llama-tiny is of the decoder family"),
    ("stream.tasks=[]", "stream.tasks: a stream has either tasks or an order; neither is given"),
    ("stream.tasks.0=spring", 'stream.tasks.0: "spring" is not a mapping of settings'),
    ("stream.tasks.0.name=../up", 'stream.tasks.0.name: "../up" cannot name a folder; allowed: letters, digits'),
    ("stream.tasks.0.name=..", 'stream.tasks.0.name: ".." cannot name a folder'),
    ("stream.tasks.0.name=/etc", 'stream.tasks.0.name: "/etc" cannot name a folder'),
    ("stream.tasks.0.name=.hidden", 'stream.tasks.0.name: ".hidden" cannot name a folder'),
    ("stream.tasks.0.name='a b'", 'stream.tasks.0.name: "a b" cannot name a folder'),
    ("stream.tasks.0.name=1", "stream.tasks.0.name: 1 is not allowed; allowed: a string"),
    ("stream.tasks.0.name=''", 'stream.tasks.0.name: "" is not allowed; allowed: a string, at least 1 character'),
    ("stream.tasks.0.name=mine", 'stream.tasks: the name "mine" is given twice'),
    ("stream.tasks.0.format=csv", 'stream.tasks.0.format: "csv" is not allowed; allowed: auto, builtin, cl_benchmark'),
    ("stream.tasks.0.labels=[1, 2]", "stream.tasks.0.labels.0: 1 is not allowed; allowed: a list of strings, or "),
    ("stream.tasks.0.subset=x", 'stream.tasks.0.subset: "x" is read by formats auto and huggingface only, not by buil'),
    ("stream.tasks.0.path=x", "generates its data"),
    ("stream.tasks.1.path=absent", "absent"),
    ("stream.tasks.5.name=x", '--set stream.tasks.5.name: stream.tasks has no entry "5"; allowed: 0 to 1'),
    ("method=migu", 'method: "migu" is not a mapping of settings; write it as {name: ...}, allowed: agem, '),
    ("method=[]", "method: the list is empty; for plain fine-tuning give the method sequential"),
    ("method.name=miguu", 'method.name: "miguu" is not a method; allowed: agem, '),
    ("method.name=miguu", "; did you mean migu?"),
    ("method={threshold: 0.5}", "method.name: missing; allowed: agem, "),
    ("method.threshold=0.5", "method.threshold: unknown key; it is a setting of kif, migu, recurrent_kif, tasl"),
    ("method={name: migu, threshold: 1.0}", "method.threshold: 1.0 is not allowed; allowed: a number, at least 0"),
    ("method={name: kif, units: rank}", "method.units: rank is a rank of LoRA, and there is no model.lora; give"),
    ("method={name: tasl, orthogonal: 0.1}", "method.orthogonal: 0.1 weighs a penalty on LoRA's matrices, and there"),
    ("method={name: tasl, weight_new: 0.4}", "method.weight_new: 0.4 and weight_old 0.7 do not add up to 1"),
    ("method={name: kif, tau: 0}", "method.tau: 0 is not allowed; allowed: a number, at least 1e-30"),
    ("method={name: kif, orthogonal: -1}", "method.orthogonal: -1 is not allowed; allowed: auto, or a number, at"),
    ("method=[{name: kif}, {name: tasl}]", "method: kif and tasl do not compose: kif, tasl and recurrent_kif all fuse"),
    ("method={name: recurrent_kif, replay_ratio: 0}", "method.replay_ratio: 0 is not allowed; allowed: a number,"),
    ("method={name: recurrent_kif, inner_steps: 0}", "method.inner_steps: 0 is not allowed; allowed: a whole number"),
    ("method={name: ewc, gamma: 1.5}", "method.gamma: 1.5 is not allowed; allowed: a number, at least 0, at most 1"),
    ("method={name: lwf, top_k: 0}", "method.top_k: 0 is not allowed; allowed: a whole number"),
    ("method={name: agem, memory_ratio: 0}", "method.memory_ratio: 0 is not allowed; allowed: a number,"),
    ("method={name: recurrent_kif, tau: 0.3}", "method.tau: unknown key; it is a setting of kif, tasl"),
    ("method=[{name: migu}, {name: migu}]", 'method: "migu" is given twice'),
    ("zero.stage=4", "zero.stage: 4 is not allowed; allowed: 0, 1, 2, 3"),
    ("zero={stage: 0, offload: true}", "zero.offload: true needs stage 1, 2 or 3, but stage is 0"),
    ("zero.deepspeed=[1]", "zero.deepspeed: [1] is not a mapping of settings"),
    ("zero.deepspeed.train_batch_size=8", "zero.deepspeed.train_batch_size: set by cl_dist from train.micro_batch"),
    ("zero.deepspeed.optimizer={type: Adam}", "zero.deepspeed.optimizer: set by cl_dist from train.learning_rate"),
    ("zero.deepspeed.bf16={enabled: true}", "zero.deepspeed.bf16: set by cl_dist from train.dtype"),
    ("zero.deepspeed.gradient_clipping=1", "zero.deepspeed.gradient_clipping: set by cl_dist from train.clip"),
    ("zero.deepspeed.sparse_gradients=true", "zero.deepspeed.sparse_gradients: not supported: DeepSpeed has"),
    ("zero.deepspeed.zero_optimization=3", "zero.deepspeed.zero_optimization: 3 is not a mapping"),
    ("zero.deepspeed.zero_optimization.stage=3", "zero_optimization.stage: set by cl_dist from zero.stage"),
    ("zero.deepspeed.zero_optimization.offload_optimizer={}", "offload_optimizer: set by cl_dist from zero.offload"),
    ("zero.deepspeed.zero_optimization.round_robin_gradients=true", "round_robin_gradients: not supported: it mixes"),
    ("launch.processes=0", "launch.processes: 0 is not allowed; allowed: a whole number, at least 1"),
    ("eval.mode=accuracy", 'eval.mode: "accuracy" is not allowed; allowed: auto, likelihood, generate, perplexity'),
    ("stream.name_tasks=true", "stream.name_tasks: true is for format cl_benchmark only, not "),
    ("eval={mode: perplexity, metric: macro_f1}", "eval.metric: macro_f1 scores generated text, but eval.mode is perp"),
    ("eval={mode: likelihood, metric: rouge_l}", "eval.metric: rouge_l scores generated text, but eval.mode is lik"),
    ("eval.normalise=case", 'eval.normalise: "case" is not allowed; allowed: none, punctuation'),
    ("eval={normalise: punctuation, metric: rouge_l}", "eval.normalise: punctuation is for exact match and macro-F1"),
    ("eval={rouge_tokenizer: unicode, metric: exact_match}", "eval.rouge_tokenizer: unicode is for ROUGE-L, which"),
    ("eval.rouge_tokenizer_path=gpt2", 'eval.rouge_tokenizer_path: "gpt2" is read only with rouge_tokenizer: xl'),
    ("eval={rouge_tokenizer: xlingual, rouge_tokenizer_path: ./no}", "eval.rouge_tokenizer: xlingual needs GPT-2's"),
    ("train.date=yesterday", 'train.date: "yesterday" is not a day; allowed: YYYY-MM-DD'),
    ("train.date=2025-02-30", 'train.date: "2025-02-30" is not a day; allowed: YYYY-MM-DD'),
    ("train={shuffle: false, group_by_length: true}", "train.group_by_length: true reorders the samples"),
    ("method={name: migu, mask_scope: micro_batch, skip_rows: false}", "mask_scope: micro_batch masks inside the"),
    ("method={name: migu, mask_scope: batch}", 'mask_scope: "batch" is not allowed; allowed: step, micro_batch'),
    ("train={max_length: 8, max_target_length: 8}", "train.max_target_length: 8 leaves no room for a prompt"),
    ("output_dir=''", 'output_dir: "" is not allowed; allowed: a string, at least 1 character'),
    ("train.epochs", "--set train.epochs: not of the form key=value"),
]  # fmt: skip

BAD_FILES = [
    ("model: [", "mine.yaml, line 1: expected the node content, but found"),
    ("", "mine.yaml: a recipe is a mapping of settings"),
    ("- a", "mine.yaml: a recipe is a mapping of settings"),
    ("model: {name_or_path: x}", "stream: missing; give a mapping of settings: The tasks"),
    (RECIPE + "model: {}", "mine.yaml, line 7: the key model is given twice"),
    (RECIPE + "train: *defaults", "mine.yaml, line 7: found undefined alias 'defaults'"),
    (RECIPE + "train: !!python/name:os.system", "mine.yaml, line 7: the tag tag:yaml.org,2002:python/name:os.system"),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe, with its data next to it."""
    data = tmp_path / "mine"
    data.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"input": f"{split} {number}", "output": "yn"[number % 2]}) for number in range(6)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


BEGINNING = r"^.*: .*, \d tasks, .*\n\d ranks? on the CPU, output in .*\nchecking data and model\n"
"""What a run prints at once, before its data and its model have been looked at."""


def refused(result: tuple[int, str, str], message: str) -> None:
    """Assert that a command ended with exit code 2 and printed only one line, this one, besides those that a run begins
    with.
    """
    code, output, error = result
    assert code == 2
    assert re.sub(BEGINNING, "", output) == ""
    assert error.startswith("cl-dist: error: ")
    assert message in error.splitlines()[0]
    assert "Traceback" not in error


@pytest.mark.parametrize(("setting", "message"), BAD_SETTINGS)
def test_a_bad_setting(setting: str, message: str, command: Command, recipe: Path) -> None:
    refused(command("run", recipe, "--set", setting), message)


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file(text: str, message: str, command: Command, recipe: Path) -> None:
    recipe.write_text(text, encoding="utf-8")
    refused(command("run", recipe), message)


def test_an_encoder_cannot_generate(command: Command, recipe: Path) -> None:
    changes = ("--set", "model.name_or_path=builtin:roberta-tiny", "--set", "eval.mode=generate")
    refused(
        command("run", recipe, *changes), "eval.mode: generate needs a model that generates text, but its objective is"
    )


def test_several_problems_get_a_line_each(command: Command, recipe: Path) -> None:
    code, _, error = command("run", recipe, "--set", "train.epochs=0", "--set", "zero.stage=9")
    assert code == 2
    assert [line.split(": ")[2] for line in error.splitlines()] == ["train.epochs", "zero.stage"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "quickstrat",
            "quickstrat: neither a shipped recipe nor a YAML file (.yaml, .yml); shipped: ",
        ),
        ("absent.yaml", "absent.yaml: the recipe cannot be read: No such file or directory"),
        ("mine", "mine: neither a shipped recipe nor"),
    ],
)
def test_no_such_recipe(name: str, message: str, command: Command, recipe: Path) -> None:
    refused(command("run", name), message)


def test_a_misspelt_shipped_recipe_is_guessed(command: Command) -> None:
    refused(command("run", "quickstrat"), "did you mean quickstart?")


def test_a_recipe_in_another_encoding(command: Command, recipe: Path) -> None:
    recipe.write_bytes("output_dir: läuft".encode("latin-1"))
    refused(command("run", recipe), "mine.yaml: the recipe is not UTF-8 text (byte 13)")


def test_a_recipe_that_is_a_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    refused(command("run", "folder.yaml"), "folder.yaml: the recipe cannot be read: Is a directory")


def test_a_broken_record_is_named(command: Command, recipe: Path) -> None:
    (recipe.parent / "mine" / "train.jsonl").write_text('{"input": "a", "output": "y"}\n{"input": "b"}\n')
    refused(command("run", recipe), "task 'mine': ")


class TestRunFolder:
    """output_dir is not empty."""

    def manifest(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        Manifest(tasks=("spring", "mine"), world_size=1, zero_stage=2, completed=1).write(folder / "manifest.json")

    def test_a_run(self, command: Command, recipe: Path) -> None:
        self.manifest(recipe.parent / "runs/mine")
        refused(
            command("run", recipe),
            "runs/mine holds a run already (1 of 2 tasks done): continue it with --resume, or put",
        )

    def test_a_run_of_another_recipe_to_resume(self, command: Command, recipe: Path) -> None:
        self.manifest(recipe.parent / "runs/mine")
        (recipe.parent / "runs/mine/config.yaml").write_text(command("recipe", "quickstart", "--all")[1])
        refused(
            command("run", recipe, "--resume"), "--resume: the recipe is not the one that runs/mine was started with"
        )

    def test_nothing_to_resume(self, command: Command, recipe: Path) -> None:
        refused(command("run", recipe, "--resume"), "--resume: runs/mine holds no run")

    def test_resume_and_fresh(self, command: Command, recipe: Path) -> None:
        refused(command("run", recipe, "--resume", "--fresh"), "--resume and --fresh exclude each other")

    def test_other_files(self, command: Command, recipe: Path) -> None:
        refused(
            command("run", recipe, "--set", "output_dir=mine"), "output_dir mine holds test.jsonl but no manifest.json"
        )

    def test_a_folder_without_a_run(self, command: Command) -> None:
        for name in ("eval", "status"):
            refused(command(name, "absent"), "absent/manifest.json is missing: absent holds no run")

    def test_no_task_is_finished_yet(self, command: Command, tmp_path: Path) -> None:
        Manifest(tasks=("a",), world_size=1, zero_stage=2).write(tmp_path / "manifest.json")
        refused(command("eval", tmp_path), "no task is finished yet, so it has saved no model")

    def test_a_task_that_is_not_done_yet(self, command: Command, tmp_path: Path) -> None:
        Manifest(tasks=("a", "b", "c"), world_size=1, zero_stage=2, completed=2).write(tmp_path / "manifest.json")
        refused(command("eval", tmp_path, "--task", "c"), "--task c: not a finished task of")

    def test_damaged_metrics(self, command: Command, tmp_path: Path) -> None:
        Manifest(tasks=("a",), world_size=1, zero_stage=2).write(tmp_path / "manifest.json")
        (tmp_path / "metrics.json").write_text("{")
        code, _, error = command("status", tmp_path)
        assert code == 2
        assert f"{tmp_path}/metrics.json is damaged" in error


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run"], ["run", "quickstart", "--nonsense"], ["status"]])
def test_a_bad_command_line_gets_the_usage(arguments: list[str], command: Command) -> None:
    code, _, error = command(*arguments)
    assert code == 2
    assert error.startswith("usage: cl-dist")


class TestOnForeignRanks:
    """Under torchrun, mpirun or srun every rank sees the same bad recipe."""

    def as_rank(self, monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
            monkeypatch.setenv(name, str(value))

    @pytest.mark.parametrize(
        ("rank", "local_rank", "expected"),
        [
            (0, 0, "cl-dist: error: train.epochs: 0 is not allowed; allowed: a whole number, at least 1\n"),
            (1, 1, ""),
            (2, 0, "cl-dist: error: rank 2: train.epochs: 0 is not allowed; allowed: a whole number, at least 1\n"),
        ],
    )
    def test_one_of_each_machine_says_so(
        self, rank: int, local_rank: int, expected: str, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.as_rank(monkeypatch, rank, local_rank)
        assert command("run", "quickstart", "--set", "train.epochs=0") == (2, "", expected)

    def test_bad_data_too(self, command: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.as_rank(monkeypatch, 1, 1)
        assert command("run", recipe, "--set", "stream.tasks.1.path=absent") == (2, "", "")

    def test_variables_that_contradict_each_other(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        refused(command("run", "quickstart"), "environment: RANK is 0, but WORLD_SIZE is not set")


@pytest.mark.parametrize("setting", ["train.epochs=x", "stream.tasks.1.path=absent", "model.name_or_path=./absent"])
def test_bad_input_is_told_before_anything_heavy_is_imported(setting: str, recipe: Path) -> None:
    code = "import sys; from cl_dist.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    end = subprocess.run(
        [sys.executable, "-c", code, "run", str(recipe), "--set", setting],
        capture_output=True,
        text=True,
        check=False,
        cwd=recipe.parent,
        env=environment,
    )
    assert re.sub(BEGINNING, "", end.stdout) == "2 False\n"
    assert end.stderr.startswith("cl-dist: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("slurm", "quickstart", "--print", "--job-name=--"),
        ("slurm", "quickstart", "--job-n=--"),
        ("slurm", "quickstart", "--nodes=--"),
        ("compare", "quickstart", "--out=--", "--dry-run"),
        ("run", "quickstart", "--set=--"),
        ("eval", "run", "--task=--"),
    ],
)
def test_two_dashes_are_no_value(command: Command, arguments: tuple[str, ...]) -> None:
    code, _, error = command(*arguments)
    assert code == 2
    assert error.splitlines()[-1].endswith(": '--' is not a value")


def test_two_dashes_end_the_options(command: Command) -> None:
    assert command("status", "--", "--debug=--")[2].startswith("cl-dist: error: --debug=--/manifest.json is missing")
    assert command("recipe", "quickstart", "--set=model.name_or_path=--")[0] == 0


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "quickstart/x"])
@pytest.mark.parametrize("words", [("status",), ("report",), ("eval",), ("run",), ("compare", "quickstart", "--out")])
def test_a_path_that_cannot_be(command: Command, words: tuple[str, ...], name: str, tmp_path: Path) -> None:
    (tmp_path / "quickstart").touch()
    code, _, error = command(*words, name)
    assert code == 2
    assert "internal error" not in error


@pytest.mark.parametrize("command_words", [("run",), ("compare", "--out", "sweep")])
def test_more_ranks_than_any_machine_holds(command: Command, command_words: tuple[str, ...], tmp_path: Path) -> None:
    for number in (1025, 2**31):
        code, _, error = command(*command_words, "quickstart", f"--set=launch.processes={number}")
        assert code == 2
        assert error.startswith(f"cl-dist: error: launch.processes: {number} ")
    assert not (tmp_path / "sweep" / "table.md").exists()

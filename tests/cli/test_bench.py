from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_dist.benchmarks.command import BENCHMARKS
from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]
QUICK = ("--runs", "2", "--threads", "1")
SIZES = {
    "step": ("--hidden", "32", "--tokens", "8", "--memory", "no"),
    "magnitude": ("--hidden", "16", "--tokens", "8"),
    "topk": ("--hidden", "16", "--tokens", "8"),
    "weight-grad": ("--hidden", "16", "--tokens", "8"),
    "column-weight-grad": ("--hidden", "16", "--tokens", "8"),
    "importance": ("--elements", "4096"),
    "optimizer": ("--elements", "4096", "--hidden", "64"),
    "bfloat16": ("--hidden", "16", "--tokens", "8"),
}
RATIOS = {
    "step": ("masked_over_dense", "masked_over_reference", "reference_over_dense"),
    "magnitude": ("fused_over_reference", "fused_over_torch", "fused_over_linear"),
    "topk": ("fused_over_reference", "fused_over_torch"),
    "weight-grad": ("masked_over_dense", "masked_over_reference", "masked_over_torch"),
    "column-weight-grad": ("columns_over_dense", "columns_over_reference", "saved_over_dense"),
    "importance": ("fused_over_reference", "fused_over_in_place"),
    "optimizer": ("rows_over_dense", "restored_over_dense", "rows_over_restored"),
    "bfloat16": ("input_gradient_mended_over_input_gradient_torch",),
}


def spreads(value: Any) -> Iterator[dict[str, float]]:
    """All objects with a median in a JSON document."""
    if isinstance(value, dict):
        if "median" in value:
            yield value
        for inner in value.values():
            yield from spreads(inner)


def run_json(command: Command, *arguments: str) -> dict[str, Any]:
    code, output, error = command("bench", *arguments, "--json")
    assert code == 0, error
    document: dict[str, Any] = json.loads(output)
    return document


@pytest.mark.parametrize("name", list(SIZES))
def test_every_benchmark_in_json_and_csv(command: Command, name: str) -> None:
    document = run_json(command, name, *SIZES[name], *QUICK, "--csv", "a.csv")
    assert document["benchmark"] == name
    assert document["machine"]["threads"] == 1
    (size,) = document["sizes"]
    for ratio in RATIOS[name]:
        assert document[ratio] == size[ratio]
        assert set(size[ratio]) == {"median", "minimum", "maximum"}
    found = list(spreads(document))
    assert len(found) > 6
    assert all(0 < spread["minimum"] <= spread["median"] <= spread["maximum"] for spread in found)
    assert size["runs"] == 2
    with open("a.csv", encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line[f"{RATIOS[name][0]}.median"]) == size[RATIOS[name][0]]["median"]


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("step", "optimizer")])
def test_several_sizes_have_a_line_each(command: Command, name: str) -> None:
    code, output, _ = command("bench", name, "--hidden", "16", "32", *QUICK, "--tokens", "8", "--threshold", "0.5")
    assert code == 0
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert table[2].split()[1] in ("16", "256")
    assert table[3].split()[1] in ("32", "1024")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", "30"), "--hidden 30: not a multiple of 8, which four attention heads need"),
        (("--tokens", "39"), "--tokens 39: too few for a prompt and an answer; give at least 40"),
    ],
)
def test_sizes_that_plan_accuracy_cannot_train(command: Command, arguments: tuple[str, str], message: str) -> None:
    code, _, error = command("bench", "plan-accuracy", *arguments)
    assert (code, error) == (2, f"cl-dist: error: {message}\n")


def test_keys_of_the_first_size_are_at_the_top_level(command: Command) -> None:
    document = run_json(command, "weight-grad", "--hidden", "32", "16", "--tokens", "8", "4", *QUICK)
    assert [(s["hidden"], s["tokens"]) for s in document["sizes"]] == [(32, 8), (32, 4), (16, 8), (16, 4)]
    assert document["hidden"] == 32
    assert document["masked_over_dense"] == document["sizes"][0]["masked_over_dense"]


def test_shapes_of_a_model(command: Command) -> None:
    document = run_json(command, "topk", "--shapes", "smollm2-135m", *QUICK)
    assert (document["layers"], document["elements"]) == (210, 30 * (2 * 576 + 2 * 192 + 2 * 1536 + 576))


class TestStep:
    """`cl-dist bench step`"""

    def test_the_sizes_are_next_to_the_ratios(self, command: Command) -> None:
        document = run_json(command, "step", *SIZES["step"], *QUICK, "--threshold", "0.5", "--intermediate", "48")
        sizes = {key: document[key] for key in ("hidden", "intermediate", "layers", "tokens", "threshold")}
        assert sizes == {"hidden": 32, "intermediate": 48, "layers": 2, "tokens": 8, "threshold": 0.5}
        assert document["gradient_error"] < 1e-5  # float32, sums of 8 products
        assert 0.5 < document["arithmetic_limit"] < 1

    def test_with_lora_there_is_little_to_skip(self, command: Command) -> None:
        document = run_json(command, "step", *SIZES["step"], *QUICK, "--lora", "4", "--layers", "1")
        assert (document["lora"], document["layers"]) == (4, 1)
        assert 0.9 < document["arithmetic_limit"] < 1

    @pytest.mark.slow
    def test_memory_of_both_ways(self, command: Command) -> None:
        document = run_json(command, "step", "--hidden", "32", "--tokens", "8", "--layers", "1", *QUICK)
        assert set(document["peak_memory_bytes"]) == {"dense", "masked"}
        # torch and transformers alone take more than 100 MiB.
        assert all(number is None or number > 100 * 2**20 for number in document["peak_memory_bytes"].values())

    @pytest.mark.slow
    def test_two_ranks_under_zero(self, command: Command) -> None:
        document = run_json(
            command, "step", *SIZES["step"], "--processes", "2", "--zero-stage", "2", "--layers", "1", *QUICK
        )
        assert (document["processes"], document["zero_stage"], document["threads_per_rank"]) == (2, 2, 1)
        assert (document["masked_over_reference"], document["reference_over_dense"]) == (None, None)
        ratio = document["masked_over_dense"]
        assert 0 < ratio["minimum"] <= ratio["median"] <= ratio["maximum"]

    def test_a_part_of_the_weights_in_whole_steps(self, command: Command) -> None:
        arguments = ("--selector", "ssu", "--accumulation", "2", "--zero-stage", "1", "--layers", "1")
        document = run_json(command, "step", *SIZES["step"], *QUICK, *arguments)
        assert (document["processes"], document["zero_stage"], document["accumulation"]) == (2, 1, 2)
        assert set(document["seconds"]) == {"dense", "selected"}
        assert document["selected_over_dense"]["minimum"] > 0
        # Elements of a block of width 32 and 88, of which ssu keeps 10 of 32 and 27 of 88 columns, and of the rest.
        block, kept, rest = 4 * 32 * 32 + 3 * 32 * 88, (4 + 2 * 88 / 32) * 10 * 32 + 32 * 27, 2 * 1024 * 32 + 3 * 32
        assert document["kept_share"] == pytest.approx((kept + rest) / (block + rest))
        assert document["state_share"] == pytest.approx(document["kept_share"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("step --hidden 0", "--hidden 0: invalid value; allowed: a whole number of at least 1"),
        ("step --hidden wide", "--hidden wide: invalid value; allowed: a whole number of at least 1"),
        ("step --hidden 50", "--hidden 50: cannot be divided into attention heads; give a multiple of 16"),
        ("step --tokens 1", "--tokens 1: a single token has no next token to predict; give at least 2"),
        ("topk --threshold 1", "--threshold 1: invalid value; allowed: a number >= 0 and < 1"),
        ("topk --threshold nan", "--threshold nan: invalid value; allowed: a number >= 0 and < 1"),
        ("topk --runs -1", "--runs -1: invalid value; allowed: a whole number of at least 1"),
        ("magnitude --dtype int8", "--dtype int8: invalid value; allowed: float32, bfloat16, float16"),
        ("step --zero-stage 4", "--zero-stage 4: invalid value; allowed: 0, 1, 2, 3"),
        ("step --zero-stage 2", "--zero-stage 2: needs ranks; give --processes too"),
        ("step --accumulation 8", "--accumulation 8: needs a method; give --selector too"),
        ("step --selector migu", "--selector migu: invalid value; allowed: hft, s2ft, ssu"),
        ("step --selector ssu --lora 8", "--lora 8: measured in a single process only; leave out --selector"),
        ("step --processes 2 --lora 8", "--lora 8: measured in a single process only; leave out --processes"),
        (
            "step --processes 2 --dtype float16",
            "--dtype float16: not supported with --processes; allowed: float32, bfloat16",
        ),
        ("step --csv no/where.csv", "--csv no/where.csv: invalid value; allowed: a file in an existing folder"),
        ("weight-grad --shapes gpt2", "--shapes gpt2: invalid value; allowed: smollm2-135m, llama2-7b, t5-l"),
        ("weight-grad --shapes t5-large --hidden 8", "--shapes t5-large: --hidden already sets the size; give only"),
        ("step --shapes t5-large --intermediate 8", "--intermediate 8: --shapes already sets it; give only one of"),
        (
            "bfloat16 --dtype float32",
            "the benchmark bfloat16 measures that dtype on the CPU only; leave out --dtype and",
        ),
        ("importance --elements 4Mi --hidden 8", "--elements: --hidden already sets the size; give only one of the"),
        ("importance --elements 1.5Mi", "--elements 1.5Mi: invalid value; allowed: a whole number of at least 1"),
        ("importance --order third", "--order third: invalid value; allowed: first, second, mixed"),
    ],
)
def test_bad_values_are_rejected_in_one_sentence(command: Command, arguments: str, sentence: str) -> None:
    code, output, error = command("bench", *arguments.split())
    assert (code, output) == (2, "")
    assert error.startswith(f"cl-dist: error: {sentence}")
    assert error.count("\n") == 1


def test_bad_values_are_refused_before_torch_is_loaded() -> None:
    code = (
        "import sys; from cl_dist.cli import main\n"
        "print(main(['bench', 'step', '--hidden', '50']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_a_missing_gpu(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, output, error = command("bench", "topk", "--device", "cuda")
    assert (code, output) == (2, "")
    assert error == "cl-dist: error: --device cuda: PyTorch finds no GPU here; use cpu\n"


def test_the_number_of_threads_is_restored(command: Command) -> None:
    import torch

    before = torch.get_num_threads()
    run_json(command, "topk", "--hidden", "16", "--tokens", "8", "--runs", "1", "--threads", str(before + 1))
    assert torch.get_num_threads() == before


class TestHelp:
    """`--help` explains what is measured"""

    def test_of_all_benchmarks(self, command: Command) -> None:
        code, output, _ = command("bench", "--help")
        assert code == 0
        text = " ".join(output.split())  # lines are wrapped at the terminal's width
        assert all(f"{name} {benchmark.summary}" in text for name, benchmark in BENCHMARKS.items())

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_of_one(self, command: Command, name: str) -> None:
        code, output, _ = command("bench", name, "--help")
        assert code == 0
        # Lines are wrapped at the terminal's width, after hyphens too.
        assert "".join(BENCHMARKS[name].description.split()) in "".join(output.split())
        assert all(flag in output for flag in ("--hidden", "--tokens", "--threshold", "--runs", "--json"))


def test_a_benchmark_is_also_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "topk.py"), "--hidden", "16", "--json"]
    done = subprocess.run([*command, *QUICK], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fused_over_reference" in json.loads(done.stdout)
    done = subprocess.run([*command, "--runs", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --runs 0: invalid value; allowed: a whole number of at least 1\n"


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_has_a_script_with_its_name(name: str) -> None:
    text = (ROOT / "benchmarks" / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env python3\n")
    assert text.endswith(f'if __name__ == "__main__":\n    main("{name}")\n')

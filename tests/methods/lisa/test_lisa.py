"""LISA through whole runs, one of them killed inside an interval; what is wrong with its settings is one sentence."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_dist.errors import BadInput
from cl_dist.methods.cost import ADAMW_BYTES
from cl_dist.methods.lisa.config import LisaConfig
from cl_dist.models.structure import separate_blocks
from cl_dist.planning.ranks import RankView
from cl_dist.seeds import derive_seed
from tests.faults.test_kill_and_resume import assert_same_end
from tests.methods.given.test_given import exported
from tests.oracle_rows import resting_blocks
from tests.planning.models import planned
from tests.recipes import write_recipe
from tests.zygote import Zygote

STEPS, INTERVAL, SEED = 8, 3, 11
TASKS = ("01-spring", "02-summer")


def write(folder: Path, **method: int) -> Path:
    """A state is saved after every fourth step: inside an interval."""
    return write_recipe(
        folder,
        method={"name": "lisa", "blocks": 1, "interval": INTERVAL, **method},
        stream={"max_train_samples": 8 * STEPS, "max_eval_samples": 4},
        train={"seed": SEED, "weight_decay": 0.1},
        checkpoint={"every_steps": 4},
        zero={"stage": 3},
        eval={"before_training": False},
    )


@pytest.fixture(scope="module")
def run(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("lisa")
    outcome = zygote.run(["run", str(write(folder)), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    return folder / "run"


def test_metrics_say_how_much_is_trained_and_held(run: Path) -> None:
    """All of the state is held, because any block may be drawn next."""
    weights = exported(run, TASKS[0])
    blocks = sorted({name.rpartition(".layers.")[2].partition(".")[0] for name in weights if ".layers." in name})
    whole = sum(weight.numel() for weight in weights.values())
    shares = {}
    for index, task in enumerate(("spring", "summer")):
        rested = 0
        for step in range(STEPS):
            seed = derive_seed(SEED, "lisa", index, step // INTERVAL)
            for block in resting_blocks(blocks, 1, seed):
                rested += sum(weight.numel() for name, weight in weights.items() if f".layers.{block}." in name)
        shares[task] = pytest.approx(1 - rested / (STEPS * whole))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["kept_share"] == shares
    assert [abs(held / (16 * whole / 2) - 1) < 0.01 for held in metrics["state_bytes_per_rank"]] == [True, True]
    after = exported(run, TASKS[1])
    drawn = [derive_seed(SEED, "lisa", 1, interval) for interval in range(-(-STEPS // INTERVAL))]
    never = set.intersection(*(set(resting_blocks(blocks, 1, seed)) for seed in drawn))
    still = [name for name in weights if torch.equal(weights[name], after[name])]
    assert still == [name for name in weights if any(f".layers.{block}." in name for block in never)]


def test_killed_inside_an_interval_and_resumed(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    path = write(tmp_path)
    fault = {"moment": "step", "on_rank": 1, "count": STEPS + 6}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=fault)
    assert outcome.codes[1] == -signal.SIGKILL
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same_end(tmp_path / "run", run)
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "run", run))
    assert one["kept_share"] == other["kept_share"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"blocks": 99}, "method.blocks: 99 is more than the model has; allowed: at most 2"),
        ({"interval": 0}, "method.interval: 0 is not allowed"),
    ],
)
def test_bad_input_is_one_sentence(zygote: Zygote, tmp_path: Path, setting: dict[str, int], message: str) -> None:
    outcome = zygote.run(["run", str(write(tmp_path, **setting))], tmp_path, world=1, timeout=120)
    assert outcome.codes == [2]
    assert message in outcome.output[0]
    assert "Traceback" not in outcome.output[0]


def test_blocks_that_share_a_weight_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1))
    model.model.layers = nn.ModuleList(list(model.model.layers)[:3])
    assert list(separate_blocks(model, "lisa")) == [f"model.layers.{number}" for number in range(3)]
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(BadInput, match=r"layers\.2\.mlp\.up_proj\.weight belongs to model\.layers\.0 too"):
        separate_blocks(model, "lisa")


@pytest.mark.parametrize("stage", [0, 3])
def test_a_plan_knows_what_rests(stage: int) -> None:
    """Of two blocks one: AdamW leaves half of what a rank owns of them alone."""
    setup, shape = planned(2, stage, methods=[LisaConfig(name="lisa", blocks=1)])
    costs = [RankView(setup, shape, rank).methods for rank in range(1 if stage == 0 else 2)]
    in_blocks = {name: each for name, each in shape.trainable.items() if ".layers." in name}
    assert all(cost.skipped == dict.fromkeys(in_blocks, 0.5) for cost in costs)
    assert sum(cost.traffic for cost in costs) == -ADAMW_BYTES * sum(each.numel for each in in_blocks.values()) / 2

#!/usr/bin/env python3
"""What a step costs when only kept rows travel and are stepped over: a model of it, beside what was measured.

    python benchmarks/step_model.py [RUN.json ...]

It writes benchmarks/results/step-model.csv, and from that the tables between the markers in docs/performance.md; with
files that `cl-dist bench wire --json` has printed, first benchmarks/results/wire.csv from them.

A step is compute, wire and optimiser, as `cl-dist plan` predicts them (`cl_dist.planning.step_time`, which also names
the sources of its formulas and of the devices' figures). With kept rows alone, a share of three parts is left: of the
reduction's bytes, and with `mask: update` of the bytes of the gather and of the optimiser's memory traffic. The share
is that of the kept rows in all trained elements; embedding, head and norms are trained whole.

Of the runs in benchmarks/results/wire.csv, the model takes the dense steps as measured, and predicts the others: the
share of a phase's time that is the wire's follows from its bytes and the link's speed.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from cl_dist.benchmarks.engine_steps import recipe_of
from cl_dist.benchmarks.report import write_csv
from cl_dist.benchmarks.training import StepSize, llama_config
from cl_dist.benchmarks.wire import PHASES, RANKS, methods_of, planned_bytes
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.methods.cost import Cost
from cl_dist.methods.sequential.config import SequentialConfig
from cl_dist.models.published import known_config
from cl_dist.models.tracked import tracked_layers
from cl_dist.planning.devices import find_device
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape, describe_model
from cl_dist.planning.step_time import Arithmetic, StepTime, predict_step
from cl_dist.planning.trace import StepTrace, trace_step
from cl_dist.planning.wire import GATHERED_WEIGHTS, UPDATED_WEIGHTS, Wire, on_the_link, plan_wire
from cl_dist.tasks.orders import resolve_order

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED, PREDICTED = RESULTS / "wire.csv", RESULTS / "step-model.csv"
PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- Written by `python benchmarks/step_model.py`: -->"
END = "<!-- End of the step model. -->"

RECIPE, DEVICE = "llama2-7b-migu", "h100"
GPUS, STAGES, MASKS = 8, (1, 2, 3), ("update", "gradient")
CLUSTERS = ((1, None), (4, 25), (4, 100), (4, 400))
"""Nodes, and the Gbit/s of each; a single node's GPUs are joined by NVLink."""
GIGABIT = 10**9 / 8
UNITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
"""Bytes per second, as tc(8) counts: in powers of ten."""

Row = dict[str, str]


def main(runs: Sequence[str]) -> None:
    """Predict everything, and write the file and the page; first the measured runs, if there are new ones."""
    if runs:
        documents = [json.loads(Path(run).read_text(encoding="utf-8")) for run in runs]
        sizes = [size for document in documents for size in document["sizes"]]
        write_csv(MEASURED, {"machine": documents[0]["machine"], "sizes": sizes})
    rows = [*of_measured(), *of_seven_billion()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with PREDICTED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section(read(PREDICTED))), encoding="utf-8")


# Shares


def kept_share(shape: ModelShape) -> float:
    """The elements in kept rows and in parameters without a mask, of all trained elements."""
    layers = tracked_layers(shape.model, "blocks")
    dropped = _skipped(shape)
    left_out = sum(shape.trainable[layer.weight].numel * dropped[layer.weight] for layer in layers.values())
    return 1 - left_out / sum(each.numel for each in shape.trainable.values())


def _skipped(shape: ModelShape) -> Mapping[str, float]:
    """The share of dropped rows by name of a weight, as MIGU tells the plan."""
    recipe = recipe_of(StepSize(16, 16, 1, 1, 1, 2, 0.7), 2)  # any: the shares depend on the layers alone
    return RankView(Setup(recipe), shape).methods.skipped


# 7B


def of_seven_billion() -> Iterator[Row]:
    """Llama2-7B on H100, by nodes, network, stage and mask."""
    for nodes, network in CLUSTERS:
        for stage in STAGES:
            yield from predicted(nodes, network, stage)


def predicted(nodes: int, network: int | None, stage: int) -> Iterator[Row]:
    """A row for each mask."""
    device = find_device(DEVICE)
    if network is not None:
        device = replace(device, network=network * GIGABIT)
    trace = _trace(nodes) if stage == 3 else None
    setups = {way: Setup(_seven_billion(nodes, stage, way), nodes, GPUS) for way in ("dense", *MASKS)}
    wires = {way: plan_wire(setup, seven_billion_shape(way), trace) for way, setup in setups.items()}

    def step(way: str) -> StepTime:
        setup, shape = setups[way], seven_billion_shape(way)
        return predict_step(setup, device, wires[way], RankView(setup, shape), Arithmetic(shape))

    times = {way: step(way) for way in setups}
    dense, sent = times["dense"], {way: _sent(wire, setups["dense"].world) for way, wire in wires.items()}
    for mask in MASKS:
        compact = times[mask]
        yield {
            "what": "Llama2-7B",
            "device": DEVICE,
            "nodes": str(nodes),
            "gpus_per_node": str(GPUS),
            "gbit_per_node": "" if network is None else str(network),
            "stage": str(stage),
            "mask": mask,
            **{f"{name}_{part}": value for name, time in (("dense", dense), ("compact", compact))
               for part, value in _parts(time).items()},
            "dense_gigabytes": _short(sent["dense"] / 1e9),
            "compact_gigabytes": _short(sent[mask] / 1e9),
            "predicted_bytes_ratio": _short(sent[mask] / sent["dense"]),
            "predicted_optimizer_ratio": _short(compact.optimizer / dense.optimizer),
            "predicted_step_ratio": _short(compact.seconds / dense.seconds),
        }  # fmt: skip


def _sent(wire: Wire, world: int) -> int:
    return on_the_link((*wire.step, *wire.methods_step), world)


def _parts(time: StepTime) -> dict[str, str]:
    """Milliseconds."""
    compute = time.forward + time.backward + time.recomputed + time.methods
    parts = {"compute": compute, "wire": time.communication, "optimizer": time.optimizer, "step": time.seconds}
    return {f"{name}_ms": _short(1e3 * seconds) for name, seconds in parts.items()}


@cache
def _recipe() -> Recipe:
    return resolve_order(*load_recipe(RECIPE))


def _seven_billion(nodes: int, stage: int, way: str) -> Recipe:
    """The shipped recipe with its global batch at another stage; without a method (`dense`), or with MIGU and this
    mask.
    """
    recipe = _recipe()
    train = replace(recipe.train, micro_batch_size=recipe.train.micro_batch_size // nodes)
    zero = replace(recipe.zero, stage=stage)  # type: ignore[arg-type]
    (migu,) = recipe.method
    method = SequentialConfig(name="sequential") if way == "dense" else replace(migu, mask=way)  # type: ignore[call-arg]
    return replace(recipe, train=train, zero=zero, method=(method,))


@cache
def seven_billion_shape(way: str) -> ModelShape:
    """Llama2-7B, without a method (`dense`) or with MIGU and this mask."""
    recipe = _seven_billion(1, 2, way)
    return describe_model(recipe, known_config(recipe.model))


@cache
def _trace(nodes: int) -> StepTrace:
    """What stage 3 gathers; the method changes nothing about it."""
    return trace_step(Setup(_seven_billion(nodes, 3, "dense"), nodes, GPUS), seven_billion_shape("dense"))


# What was measured


@dataclass(frozen=True)
class Run:
    """A line of wire.csv."""

    line: Mapping[str, str]

    def seconds(self, phase: str, way: str) -> float:
        """Median of a phase."""
        return float(self.line[f"phases.{phase}.{way}.median"])

    def step(self, way: str) -> float:
        """The phases together."""
        return sum(self.seconds(phase, way) for phase in PHASES)

    @property
    def size(self) -> StepSize:
        """The model and the tokens."""
        numbers = ("hidden", "intermediate", "heads", "key_value_heads", "layers", "tokens")
        return StepSize(
            **{name: int(self.line[name]) for name in numbers},
            threshold=float(self.line["threshold"]),
            dtype=self.line["dtype"],
        )

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self.line["zero_stage"])

    def speed(self, weights: float) -> float:
        """Bytes per second of the link: what it was shaped to, or else what the gather of the weights reached."""
        rate = self.line["rate"]
        unit = next((unit for unit in UNITS if rate.endswith(unit)), None)
        if unit is None:  # at stage 3 nothing says how fast it was
            return weights / self.seconds("gather", "dense") if weights else math.inf
        return float(rate.removesuffix(unit)) * UNITS[unit]


def of_measured() -> Iterator[Row]:
    """A row for each measured run, with what the model makes of its dense steps."""
    with MEASURED.open(encoding="utf-8", newline="") as file:
        runs = [Run(line) for line in csv.DictReader(file)]
    for run in runs:
        size, mask = run.size, run.line["mask"]
        dense = planned_bytes(size, run.stage)
        compact = planned_bytes(size, run.stage, methods_of("compact", size.threshold, mask))
        predicted = predicted_phases(run, dense, compact)
        yield {
            "what": f"hidden {size.hidden}, {size.tokens} tokens",
            "device": "two CPU ranks",
            "link": run.line["rate"],
            "stage": str(run.stage),
            "mask": mask,
            "dense_step_ms": _short(1e3 * run.step("dense")),
            "compact_step_ms": _short(1e3 * sum(predicted.values())),
            "predicted_bytes_ratio": _short(sum(compact.values()) / sum(dense.values())),
            "measured_bytes_ratio": run.line["bytes_compact_over_dense.median"],
            "measured_tracked_bytes_ratio": run.line["tracked_bytes_compact_over_dense"],
            "predicted_optimizer_ratio": _short(predicted["optimizer"] / run.seconds("optimizer", "dense")),
            "predicted_step_ratio": _short(sum(predicted.values()) / run.step("dense")),
            **{f"measured_{name}_ratio{end}": run.line[f"{name}_compact_over_dense.{value}"]
               for name in ("optimizer", "step")
               for end, value in (("", "median"), ("_least", "minimum"), ("_most", "maximum"))},
            **{f"measured_off_step_ratio{end}": run.line[f"step_off_over_dense.{value}"]
               for end, value in (("", "median"), ("_least", "minimum"), ("_most", "maximum"))},
        }  # fmt: skip


def predicted_phases(run: Run, dense: Mapping[str, int], compact: Mapping[str, int]) -> dict[str, float]:
    """Seconds of each phase of a compact step.

    Args:
        run: Has those of the dense step.
        dense: Bytes that each rank sends in a dense step, by what they carry (`wire.planned_bytes`).
        compact: The same for a compact one.
    """
    size, update = run.size, run.line["mask"] == "update"
    shape = _shape_of(size, run.line["mask"])
    setup = Setup(recipe_of(size, run.stage), 1, RANKS, "cpu", length=size.tokens, answer=size.tokens - 1)
    arithmetic, skips = Arithmetic(shape), Cost(skipped=_skipped(shape))
    multiplied = arithmetic.backward_flop(setup, skips) / arithmetic.backward_flop(setup, Cost())

    # Of backward, the wire's time is known; stage 3 also fetches weights in it, half of what it fetches in all.
    speed, backward = run.speed(dense.get(UPDATED_WEIGHTS, 0)), run.seconds("backward", "dense")
    reduction, fetch = dense["gradients"] / speed, dense.get(GATHERED_WEIGHTS, 0) / 2 / speed
    work = max(0.0, backward - reduction - fetch)
    gathered = compact[UPDATED_WEIGHTS] / dense[UPDATED_WEIGHTS] if UPDATED_WEIGHTS in dense else 1.0
    return {
        "forward": run.seconds("forward", "dense"),
        "backward": work * multiplied + min(backward - work, fetch + compact["gradients"] / speed),
        "optimizer": run.seconds("optimizer", "dense") * (kept_share(shape) if update else 1.0),
        "gather": run.seconds("gather", "dense") * gathered,
    }


@cache
def _shape_of(size: StepSize, mask: str) -> ModelShape:
    recipe = replace(recipe_of(size, 2), method=methods_of("compact", size.threshold, mask))
    return describe_model(recipe, llama_config(size))


# The page


def read(path: Path) -> list[Row]:
    """The rows that `main` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def section(rows: Sequence[Row]) -> str:
    """The text between the markers."""
    measured = [row for row in rows if row["measured_step_ratio"]]
    predicted = [row for row in rows if not row["measured_step_ratio"]]
    head = ("link", "stage", "mask", "dense step, ms", "bytes: predicted", "measured", "of tracked layers",
            "optimiser: predicted", "measured", "step: predicted", "measured", "`compact: off`, measured")  # fmt: skip
    lines = [
        (
            row["link"],
            row["stage"],
            row["mask"],
            f"{float(row['dense_step_ms']):.0f}",
            _two(row["predicted_bytes_ratio"], 3),
            _two(row["measured_bytes_ratio"], 3),
            _two(row["measured_tracked_bytes_ratio"], 3),
            _two(row["predicted_optimizer_ratio"]),
            _spread(row, "measured_optimizer_ratio"),
            _two(row["predicted_step_ratio"]),
            _spread(row, "measured_step_ratio"),
            _spread(row, "measured_off_step_ratio"),
        )
        for row in measured
    ]
    big_head = ("GPUs", "Gbit/s a node", "stage", "dense: compute, ms", "wire left over", "optimiser", "step",
                "GB sent by a rank", "`gradient`: bytes", "step", "`update`: bytes", "optimiser", "step")  # fmt: skip
    return f"{_table(head, lines)}\n\n{_table(big_head, list(_of_clusters(predicted)))}"


def _of_clusters(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    places = dict.fromkeys((row["nodes"], row["gbit_per_node"], row["stage"]) for row in rows)
    for nodes, gbit, stage in places:
        wanted = (nodes, gbit, stage)
        both = {row["mask"]: row for row in rows if (row["nodes"], row["gbit_per_node"], row["stage"]) == wanted}
        gradient, update = both["gradient"], both["update"]
        gpus = gradient["gpus_per_node"]
        yield (
            gpus if nodes == "1" else f"{nodes} × {gpus}",
            gbit or "NVLink",
            stage,
            *(f"{float(gradient[f'dense_{part}_ms']):.0f}" for part in ("compute", "wire", "optimizer", "step")),
            f"{float(gradient['dense_gigabytes']):.1f}",
            _two(gradient["predicted_bytes_ratio"]),
            _two(gradient["predicted_step_ratio"]),
            _two(update["predicted_bytes_ratio"]),
            _two(update["predicted_optimizer_ratio"]),
            _two(update["predicted_step_ratio"]),
        )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" if cells is not rule else "|---" * len(head) + "|"
                     for cells in (head, rule, *lines))  # fmt: skip


def _spread(row: Row, name: str) -> str:
    return f"{_two(row[name])} ({_two(row[f'{name}_least'])}–{_two(row[f'{name}_most'])})"


def _two(number: str, digits: int = 2) -> str:
    return f"{float(number):.{digits}f}"


def _short(number: float) -> str:
    return f"{number:.4g}"


def with_section(page: str, text: str) -> str:
    """The page with another section. Raises BadInput if the markers are not there exactly once, in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise BadInput(f"the page needs one line {BEGIN!r} and, below it, one line {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    main(sys.argv[1:])

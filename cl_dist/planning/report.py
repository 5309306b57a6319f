"""A plan as text, as JSON, and as a recipe that says why it is as it is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cl_dist.config.load import to_dict
from cl_dist.config.ranges import is_default
from cl_dist.config.yaml_text import render_yaml
from cl_dist.planning.devices import EFFICIENCY
from cl_dist.planning.dry_run import DryRun
from cl_dist.planning.dry_run import as_json as dry_run_as_json
from cl_dist.planning.plan import GIB, Plan, Planner, gib
from cl_dist.planning.stream_time import CHARACTERS_PER_TOKEN

LABEL = 15
"""Width of the column of labels."""


def as_json(
    planner: Planner, own: Plan, others: Sequence[Plan], best: Plan | None, found: DryRun | None
) -> dict[str, Any]:
    """Everything as JSON types."""
    setup = own.setup
    result = {
        "predicted": True,
        "fits": own.fits,
        "obstacles": list(own.obstacles),
        "notes": contradictions(own),
        "per_rank_bytes": {**own.memory.device, **{f"{name} (host)": size for name, size in own.memory.host.items()}},
        "step_seconds": own.time.seconds,
        "step_seconds_by_part": _parts(own),
        "tokens_per_second": own.time.tokens_per_second,
        "hours": None if own.stream is None else own.stream.hours,
        "wire_bytes_per_step": own.wire_bytes(),
        "wire_bytes_by_collective": {
            each.what: each.on_the_link(setup.world) for each in (*own.wire.step, *own.wire.methods_step)
        },
        "checkpoint_bytes": own.checkpoint_bytes,
        "alternatives": [_short(plan) for plan in others],
        "recommended": None if best is None else _short(best),
        "device": planner.device.name,
        "published_shape": planner.published,
        "nodes": setup.nodes,
        "ranks": setup.world,
        "data": planner.stream if isinstance(planner.stream, str) else planner.stream.basis,
        "data_is_here": not isinstance(planner.stream, str) and planner.stream.measured,
        "assumed": asdict(EFFICIENCY),
    }
    if found is not None:
        result["dry_run"] = dry_run_as_json(found)
    return result


def _short(plan: Plan) -> dict[str, Any]:
    return {
        **plan.settings(),
        "fits": plan.fits,
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "step_seconds": plan.time.seconds,
        "tokens_per_second": plan.time.tokens_per_second,
        "hours": None if plan.stream is None else plan.stream.hours,
        "wire_bytes_per_step": plan.wire_bytes(),
    }


def _parts(plan: Plan) -> dict[str, float]:
    names = ("forward", "backward", "recomputed", "methods", "optimizer", "communication", "transfers")
    return {name: getattr(plan.time, name) for name in names}


def lines(
    planner: Planner,
    own: Plan,
    others: Sequence[Plan],
    best: Plan | None,
    found: DryRun | None,
    name: str,
    *,
    wide: bool,
) -> Iterator[str]:
    """The plan as text."""
    columns = 120 if wide else 80
    yield from _what(planner, own, name, columns)
    yield ""
    yield from _memory(own)
    yield ""
    yield from _time(planner, own, columns)
    yield ""
    yield from table(others, best, wide=wide)
    if found is not None:
        yield ""
        yield from _findings(found, columns)
    yield ""
    yield from _entry("assumed", _assumptions(), columns)


def _entry(label: str, text: str, columns: int) -> list[str]:
    """A label and a text that is folded beside it."""
    body = textwrap.wrap(text, columns - LABEL, break_long_words=False) or [""]
    return [f"{label if number == 0 else '':<{LABEL}}{line}" for number, line in enumerate(body)]


def _what(planner: Planner, own: Plan, name: str, columns: int) -> Iterator[str]:
    setup, train, shape = own.setup, own.setup.recipe.train, planner.shape
    trained = sum(each.numel for each in shape.trainable.values())
    number = shape.own_numel
    count = f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"
    whole = f"{count} parameters, {trained / number:.1%} of them trained"
    methods = ", ".join(method.name for method in setup.recipe.method)
    model = setup.recipe.model.name_or_path + " (not here: its published shape)" * planner.published
    yield from _entry("recipe", f"{name}: {model}, {whole}; method {methods}", columns)
    batch = train.micro_batch_size * train.gradient_accumulation * setup.world
    where = f"{setup.nodes} x {setup.ranks_per_node} {planner.device.title}"
    yield from _entry(
        "on",
        f"{where}: {setup.world} ranks, global batch {batch} = {train.micro_batch_size} x "
        f"{train.gradient_accumulation} x {setup.world}; {_words(own)}",
        columns,
    )
    for note in contradictions(own):
        yield from _entry("note", note, columns)
    if own.fits:
        yield from _entry("fits", f"yes: {gib(own.device_bytes)} GiB on each device at the peak (predicted)", columns)
    for obstacle in own.obstacles:
        yield from _entry("does not fit", f"{obstacle} (predicted)", columns)


def contradictions(own: Plan) -> list[str]:
    """Where the recipe says something else about the machines than the command, one sentence each."""
    launch, setup, found = own.setup.recipe.launch, own.setup, []
    if not is_default(launch, "processes") and launch.processes not in ("auto", setup.ranks_per_node):
        found.append(
            f"launch.processes is {launch.processes} in the recipe; planned with {setup.ranks_per_node} a node"
        )
    if launch.device not in ("auto", own.device.kind):
        found.append(f"launch.device is {launch.device} in the recipe; planned for {own.device.title}")
    return found


def _words(plan: Plan) -> str:
    settings = plan.settings()
    extras = [
        word
        for name, word in (("offload", "offload"), ("activation_checkpointing", "activation checkpointing"))
        if settings[name]
    ]
    return ", ".join([f"ZeRO stage {settings['stage']}", plan.setup.recipe.train.dtype, *extras])


def _memory(own: Plan) -> Iterator[str]:
    yield f"{'memory a rank':<{LABEL}}{'GiB':>9}  predicted, at the peak of a step"
    for kind, parts in (("device", own.memory.device), ("host", own.memory.host)):
        for name, size in sorted(parts.items(), key=lambda part: -part[1]):
            if size >= GIB // 200:
                yield f"{kind:<{LABEL}}{gib(size):>9}  {name}"


def _time(planner: Planner, own: Plan, columns: int) -> Iterator[str]:
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in _parts(own).items() if seconds >= 5e-4)
    stream = planner.stream
    length = (
        "samples of train.max_length tokens" if isinstance(stream, str) else f"samples of {stream.length:.0f} tokens"
    )
    yield from _entry("step", f"{own.time.seconds:.3g} s (predicted; {length}): {parts}", columns)
    yield from _entry("throughput", f"{own.time.tokens_per_second:,.0f} tokens/s on all ranks (predicted)", columns)
    yield from _entry("network", f"{_network(own)}", columns)
    save = own.checkpoint_bytes / EFFICIENCY.storage
    yield from _entry("checkpoint", f"{gib(own.checkpoint_bytes)} GiB in all, {save:.3g} s (predicted)", columns)
    if isinstance(stream, str) or own.stream is None:
        why = str(stream).partition(";")[0]
        text = f"not known, because the data cannot be read here ({why}); give --samples N"
    else:
        times = own.stream
        text = (
            f"{times.hours:.2f} h (predicted): {times.steps} steps {times.training / 3600:.2f} h, evaluation "
            f"{times.evaluation / 3600:.2f} h, checkpoints {times.checkpoints / 3600:.2f} h; by {stream.basis}"
        )
    yield from _entry("whole stream", text, columns)


def _network(own: Plan) -> str:
    world = own.setup.world
    methods = sum(each.on_the_link(world) for each in own.wire.methods_step)
    parts = [f"{each.what} {each.on_the_link(world) / 1e9:.3g}" for each in own.wire.step]
    text = f"{own.wire_bytes() / 1e9:.3g} GB a step from each rank (predicted)"
    if world == 1:
        return "none: one rank"
    hidden = f"; {own.time.hidden:.3g} s of it hide behind arithmetic" if own.time.hidden else ""
    return f"{text}: {', '.join(parts)}, methods {methods / 1e9:.3g}{hidden}"


def table(others: Sequence[Plan], best: Plan | None, *, wide: bool) -> Iterator[str]:
    """The alternatives, at most 80 columns wide, or 120."""
    head = ["stage", "micro", "accum", "offload", "recompute", "GiB", "fits", "s/step", "tokens/s"]
    if wide:
        head += ["host GiB", "GB sent", "comm s", "hours"]
    rows = [head]
    for plan in others:
        settings = plan.settings()
        row = [
            str(settings["stage"]),
            str(settings["micro_batch_size"]),
            str(settings["gradient_accumulation"]),
            "yes" if settings["offload"] else "no",
            "yes" if settings["activation_checkpointing"] else "no",
            f"{plan.device_bytes / GIB:.1f}",
            "yes" if plan.fits else "no",
            f"{plan.time.seconds:.3g}",
            f"{plan.time.tokens_per_second:,.0f}",
        ]
        if wide:
            hours = "?" if plan.stream is None else f"{plan.stream.hours:.2f}"
            sent = f"{plan.wire_bytes() / 1e9:.2f}"
            row += [f"{plan.host_bytes / GIB:.1f}", sent, f"{plan.time.communication:.3g}", hours]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for number, row in enumerate(rows):
        mark = "*" if number and best is others[number - 1] else " "
        yield mark + " " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield "* recommended" if best is not None else "nothing here fits: use more devices, or larger ones"


def _findings(found: DryRun, columns: int) -> Iterator[str]:
    verdict = "nothing would fail" if found.works else f"{len(found.problems)} problems"
    yield from _entry("dry run", f"{found.ranks} ranks: {verdict}", columns)
    for text in found.problems:
        yield from _entry("PROBLEM", text, columns)
    for text in found.notes:
        yield from _entry("checked", text, columns)


def _assumptions() -> str:
    each = EFFICIENCY
    return (
        f"a step reaches {each.arithmetic:.0%} of the device's matrix peak, {each.memory:.0%} of its memory bandwidth, "
        f"{each.link:.0%} of its links and {each.pcie:.0%} of PCIe; {each.overlap:.0%} of the communication that "
        f"DeepSpeed overlaps hides behind arithmetic; a collective takes {each.latency * 1e6:.0f} µs more, and "
        f"{each.hop * 1e6:.0f} µs a hop; {each.storage / 1e9:g} GB/s to storage; a run can use "
        f"{each.usable_memory:.0%} of the device's memory; {CHARACTERS_PER_TOKEN:g} characters a token; nothing here "
        "was measured on the device"
    )


def recipe_text(best: Plan, own: Plan, name: str) -> str:
    """The recommended recipe as YAML, with a comment at each setting that the plan has chosen."""
    setup, train, zero = best.setup, best.setup.recipe.train, best.setup.recipe.zero
    batch = train.micro_batch_size * train.gradient_accumulation * setup.world
    data = to_dict(setup.recipe)
    if isinstance(data["launch"]["processes"], int):
        data["launch"]["processes"] = setup.ranks_per_node
    if data["launch"]["device"] not in ("auto", best.device.kind):
        data["launch"]["device"] = best.device.kind
    head = [
        f"# {name} on {setup.nodes} x {setup.ranks_per_node} {best.device.title}, as cl-dist plan recommends it.",
        f"# Predicted: {best.time.seconds:.3g} s a step, {best.time.tokens_per_second:,.0f} tokens/s, "
        f"{gib(best.device_bytes)} GiB on each device at the peak.",
        f"# The recipe as it was: {own.time.seconds:.3g} s a step"
        + (f", {gib(own.device_bytes)} GiB." if own.fits else f"; it does not fit: {gib(own.device_bytes)} GiB."),
    ]
    why = {
        "train.micro_batch_size": f"global batch {batch} = {train.micro_batch_size} x {train.gradient_accumulation} x "
        f"{setup.world} ranks, as in the recipe; this split is the fastest that fits",
        "train.gradient_accumulation": _why_accumulation(best),
        "train.activation_checkpointing": _why_checkpointing(best),
        "zero.stage": f"the fastest stage that fits: {gib(best.device_bytes)} GiB of "
        f"{gib(best.device.memory * EFFICIENCY.usable_memory)} GiB usable on each device",
        "zero.offload": "the optimiser's state does not fit on the devices otherwise, or would leave less room"
        if zero.offload
        else "the optimiser's state stays on the devices, since it fits there",
        "launch.processes": f"one rank per device: {setup.ranks_per_node} on each node"
        + (f"; {setup.nodes} nodes start them with cl-dist slurm or torchrun" if setup.nodes > 1 else ""),
    }
    return "\n".join([*head, *_with_comments(render_yaml(data), why)]) + "\n"


def _why_accumulation(plan: Plan) -> str:
    count = plan.setup.recipe.train.gradient_accumulation
    if count == 1:
        return "one micro-batch a step: masks are known before backward, which can then skip rows"
    return f"{count} micro-batches a step make up the global batch"


def _why_checkpointing(plan: Plan) -> str:
    if plan.setup.recipe.train.activation_checkpointing:
        return "recomputing activations makes room for this stage and micro-batch"
    return "activations fit, so that nothing is computed twice"


def _with_comments(text: str, why: Mapping[str, str]) -> Iterator[str]:
    """Put each comment above its setting."""
    section = ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "-")):
            section = line.partition(":")[0]
        key = f"{section}.{line.strip().partition(':')[0]}"
        if key in why and line.startswith("  ") and not line.startswith("   "):
            yield f"  # {why[key]}"
        yield line

"""What the measurements say, as tables for the screen, the page and summary.json. Imports no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cl_dist.benchmarks.gpu.parts import PARTS

Day = Mapping[str, Mapping[str, Any]]
"""The content of each part's JSON by the part's name."""
Row = Mapping[str, str]
MISSING = "–"


def overview(day: Day) -> dict[str, Any]:
    """The content of summary.json: device and mode, how each part ended, and the tables as lists of rows."""
    return {
        "device": _one(day, "device"),
        "mode": _one(day, "mode"),
        "parts": {name: {key: part.get(key) for key in ("status", "reason", "seconds")} for name, part in day.items()},
        "findings": {title: [dict(row) for row in rows] for title, rows in _all(day)},
    }


def tables(day: Day) -> str:
    """Everything as Markdown: the device, and a table for each subject that has measurements."""
    blocks = [f"Device: {_one(day, 'device') or 'unknown'}. Mode: {_one(day, 'mode') or 'unknown'}."]
    blocks += [f"**{title}**\n\n{_markdown(rows)}" for title, rows in _all(day) if rows]
    return "\n\n".join(blocks)


def _one(day: Day, key: str) -> Any:
    return next((part[key] for part in day.values() if part.get(key) is not None), None)


def _all(day: Day) -> Iterator[tuple[str, list[Row]]]:
    yield "Parts", [_part(name, part) for name, part in day.items()]
    for name, title, rows in _TABLES:
        measured = {key: value for key, value in _measurements(day, name).items() if not _missing(value)}
        yield title, list(rows(measured))
    left_out = ((name, key, value) for name in day for key, value in _measurements(day, name).items())
    yield "Not measured", [_why(name, key, value) for name, key, value in left_out if _missing(value)]


def _measurements(day: Day, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = day.get(name, {}).get("measurements", {})
    return found


def _missing(value: Mapping[str, Any]) -> bool:
    return "failed" in value or "skipped" in value


def _part(name: str, part: Mapping[str, Any]) -> Row:
    entries = part.get("measurements", {}).values()
    return {
        "part": name,
        "what": PARTS[name].summary,
        "ended": part["status"] + (f": {part['reason']}" if part.get("reason") else ""),
        "measured": str(sum(not _missing(entry) for entry in entries)),
        "failed or skipped": str(sum(map(_missing, entries))),
    }


def _why(part: str, name: str, value: Mapping[str, Any]) -> Row:
    return {"part": part, "what": name, "why": value.get("failed") or value.get("skipped") or MISSING}


def _machine(measured: Mapping[str, Any]) -> Iterator[Row]:
    units = {"teraflops": "TFLOP/s", "gigabytes_per_second": "GB/s"}
    for name, value in measured.items():
        for key, unit in units.items():
            if key in value:
                yield {"limit": name, "measured": f"{value[key]:.4g} {unit}"}
        for way in ("to_device", "to_host"):
            if (rate := value.get(f"{way}_gigabytes_per_second")) is not None:
                yield {"limit": f"{name}, {way.replace('_', ' ')}", "measured": f"{rate:.3g} GB/s"}
    for name, took in measured.get("launches", {}).items():
        if name != "took_seconds":
            yield {"limit": name.replace("_", " "), "measured": f"{1e6 * took:.3g} µs"}


def _kernels(measured: Mapping[str, Any]) -> Iterator[Row]:
    """One line for each kernel, and one for each check that failed."""
    for kernel in dict.fromkeys(name.split()[0] for name in measured):
        checks = {name: value for name, value in measured.items() if name.split()[0] == kernel}
        errors = [value["error"] for value in checks.values() if value.get("error") is not None]
        yield {
            "kernel": kernel,
            "right": f"{sum(value['ok'] for value in checks.values())} of {len(checks)}",
            "same bits": f"{sum(value['same_bits'] for value in checks.values())} of {len(checks)}",
            "largest relative error": f"{max(errors):.1e}" if errors else MISSING,
        }
    for name, value in measured.items():
        if not value["ok"]:
            error = value.get("error")
            shown = MISSING if error is None else f"{error:.1e}"
            yield {"kernel": f"WRONG: {name}", "right": "0 of 1", "same bits": MISSING, "largest relative error": shown}


def _weight_grad(measured: Mapping[str, Any]) -> Iterator[Row]:
    for value in (value for value in measured.values() if "kept_rows" in value):
        over = value["over_dense"]
        others = [name for name in over if name not in ("dense", "masked_weight_grad")]
        fastest = min(others, key=lambda name: over[name]["median"])
        yield {
            "tokens": str(value["tokens"]),
            "rows × inputs": f"{value['rows']} × {value['inputs']}",
            "dense": _milliseconds(value["seconds"]["dense"]),
            "dense, TFLOP/s": f"{value['dense_teraflops']:.3g}",
            **{f"{name} / dense": _ratio(ratio) for name, ratio in over.items() if name != "dense"},
            "chosen": value["chosen"],
            "fastest": fastest,
        }


def _column_grad(measured: Mapping[str, Any]) -> Iterator[Row]:
    for value in (value for value in measured.values() if "kept_columns" in value):
        yield {
            "tokens": str(value["tokens"]),
            "rows × inputs": f"{value['rows']} × {value['inputs']}",
            "dense": _milliseconds(value["seconds"]["dense"]),
            **{f"{name} / dense": _ratio(ratio) for name, ratio in value["over_dense"].items() if name != "dense"},
            "chosen": value["chosen"],
        }


def _step(measured: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in measured.items():
        if "masked_over_dense" in value:
            yield {
                "step": name,
                "dense": _milliseconds(value["seconds"]["dense"]),
                "dense, TFLOP/s": f"{value['dense_teraflops']:.3g}",
                "masked / dense": _ratio(value["masked_over_dense"]),
                "arithmetic": f"{value['arithmetic_limit']:.2f}",
                "masked / reference": _ratio(value["masked_over_reference"]),
                "KIF / dense": _ratio(value["kif_over_dense"]),
            }


def _engine(measured: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in measured.items():
        if "migu_over_dense" in value:
            yield {
                "step": name,
                "dense": _milliseconds(value["seconds"]["dense"]),
                "MIGU / dense": _ratio(value["migu_over_dense"]),
                "KIF / dense": _ratio(value["kif_over_dense"]),
            }


def _counts(measured: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in measured.items():
        if "operators" in value:
            yield {
                "step": name.replace("profile of ", ""),
                "operators": str(value["operators"]),
                "kernels": _count(value["kernels"]),
                "launches": _count(value["launches"]),
                "host waits": _count(value["host_waits"]),
                "GPU idle": _share(value["idle_seconds"], value["host_seconds"]),
            }


def _runs(measured: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in measured.items():
        equal = value.get("equal_bits")
        yield {
            "run": name,
            "exit code": str(value["exit_code"]),
            "seconds": f"{value['seconds']:.0f}",
            "equals its twin": MISSING if equal is None else ("bit for bit" if equal else "NO"),
        }


def _operations(measured: Mapping[str, Any]) -> Iterator[Row]:
    for name, value in measured.items():
        # AdamW on kept rows is compared with a step on all rows, of which the others are put back.
        ours, other = ("fused", "reference") if "fused" in value["seconds"] else ("rows", "restored")
        yield {
            "operation": name,
            "fused": _milliseconds(value["seconds"][ours]),
            "fused / reference": _ratio(value[f"{ours}_over_{other}"]),
            "of the memory's rate": f"{100 * value['of_limit'][ours]['median']:.0f} %",
        }


def _milliseconds(spread: Mapping[str, float]) -> str:
    return f"{1e3 * spread['median']:.4g} ms"


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['minimum']:.3g}–{spread['maximum']:.3g})"


def _count(number: int | None) -> str:
    return MISSING if number is None else str(number)


def _share(part: float | None, whole: float) -> str:
    return MISSING if part is None else f"{100 * part / whole:.0f} %"


def _markdown(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(row.get(name, MISSING).replace("|", "/") for name in names) + " |" for row in rows]
    return "\n".join(lines)


_TABLES: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Iterator[Row]]], ...] = (
    ("machine", "Measured limits", _machine),
    ("kernels", "Kernels against float64", _kernels),
    ("weight-grad", "Ways to the masked weight gradient", _weight_grad),
    ("weight-grad", "Ways to the gradient of kept columns", _column_grad),
    ("step", "Forward and backward", _step),
    ("step", "What a step asks of the device", _counts),
    ("engine", "Whole steps under DeepSpeed", _engine),
    ("engine", "What a step under DeepSpeed asks of the device", _counts),
    ("runs", "Whole runs", _runs),
    ("operations", "Small operations", _operations),
)

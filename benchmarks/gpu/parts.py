"""The parts of a day with a GPU, most valuable first. Imports no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part, which runs in a process of its own and has a JSON file of its own."""

    name: str
    function: str
    """`module:function`, called with a `Record` and the device."""
    seconds: int
    """Its limit when the day has `PLANNED_MINUTES`; other lengths scale it."""
    summary: str


PLANNED_MINUTES = 9
_HERE = "cl_dist.benchmarks.gpu"
PARTS = {
    part.name: part
    for part in (
        Part("machine", f"{_HERE}.ceilings:measure", 35, "versions and limits: products, memory, launches, links"),
        Part("kernels", f"{_HERE}.checks:measure", 80, "every kernel against float64, and the same bits when repeated"),
        Part("weight-grad", f"{_HERE}.operations:weight_grads", 75, "the ways to the masked dW, Llama2-7B's shapes"),
        Part("step", f"{_HERE}.steps:measure", 100, "forward and backward, 7B-shaped: dense, MIGU, KIF; full and LoRA"),
        Part("runs", f"{_HERE}.runs:measure", 120, "whole runs: stages, offload, methods; two equal runs bit by bit"),
        Part("engine", f"{_HERE}.engines:measure", 80, "whole steps under DeepSpeed: dense, MIGU, KIF; stages 2 and 3"),
        Part("operations", f"{_HERE}.operations:others", 50, "magnitude, top-k and importance against memory's rate"),
    )
}  # fmt: skip
"""All parts by name, in the order in which they run."""

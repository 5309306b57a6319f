"""Compiles every kernel for GPUs that need not be present, and reads the result with the compilers' own tools.

`python -m tests.kernels.aot` prints the table of docs/performance.md, with `--json` what `test_compiled.py` reads. It
must not run under TRITON_INTERPRET=1, under which kernels cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.kernels.launches import CASES, Case


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about one kernel on one target."""

    kernel: str
    target: str
    registers: int
    """Per thread."""
    spills: int
    """Bytes of local memory per thread (NVIDIA) or registers spilled (AMD)."""
    shared: int
    """Bytes per program."""
    wide_loads: int
    """Instructions that move 16 bytes or more per thread from global memory, out of `loads`; masks are not counted."""
    loads: int
    wide_stores: int
    stores: int
    threads: int
    """Per program."""
    long: bool
    """Whether the program's number is widened to 64 bits before anything else is computed from it."""
    resident: int
    """Warps of 32 threads per multiprocessor, or waves of 64 per compute unit."""


TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)} | {
    "gfx942": ("hip", "gfx942", 64)
}
SHARED_OF_MULTIPROCESSOR = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}


def compile_case(case: Case, target_name: str) -> Compiled:
    """Compile one launch the way Triton's launcher would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget(*TARGETS[target_name])
    torch.version.hip = "7.0" if target.backend == "hip" else None  # as in the build of torch for that target
    launch, backend = case.build(), make_backend(target)
    settings = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **settings, debug=False)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, settings, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    read = _read_amd if target.backend == "hip" else _read_nvidia
    return Compiled(case.name, target_name, **read(compiled, target_name), long=_is_long(compiled.asm["ttir"]))


def _is_long(ir: str) -> bool:
    """Whether every program number is used in 64 bits only."""
    numbers = re.findall(r"(%[\w.]+) = tt.get_program_id", ir)
    uses = [
        line for line in ir.splitlines() for number in numbers if re.search(rf"= .*{re.escape(number)}\b(?!\w)", line)
    ]
    return all("arith.extsi" in line and "to i64" in line for line in uses)


def _read_nvidia(compiled: Any, target_name: str) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Single bytes are masks; PTX reads one several times, which ptxas joins.
    loads, stores = (re.findall(rf"\b{kind}\.global(?![.\w]*8\b)[.\w]*", compiled.asm["ptx"]) for kind in ("ld", "st"))
    loads += re.findall(r"cp\.async\.c[ag]\..*;", compiled.asm["ptx"])
    threads, shared = compiled.metadata.num_warps * 32, compiled.metadata.shared
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": shared,
        "wide_loads": sum(_is_wide(load) for load in loads),
        "loads": len(loads),
        "wide_stores": sum(_is_wide(store) for store in stores),
        "stores": len(stores),
        "threads": threads,
        "resident": _resident_warps(used["REG"], shared, threads, SHARED_OF_MULTIPROCESSOR[target_name]),
    }


def _is_wide(instruction: str) -> bool:
    """Whether a PTX instruction such as `ld.global.v4.b32` moves at least 16 bytes per thread.

    Asynchronous copies to shared memory, `cp.async.cg.shared.global [to], [from], 0x10`, have the number of bytes.
    """
    if instruction.startswith("cp.async"):
        return ", 0x10" in instruction
    shape = re.search(r"\.v(\d)\.\w(\d+)", instruction)
    return shape is not None and int(shape[1]) * int(shape[2]) >= 128


def _resident_warps(registers: int, shared: int, threads: int, shared_of_multiprocessor: int) -> int:
    """Occupancy of compute capability 8.0, 9.0 and 10.0 (CUDA C++ Programming Guide, technical specifications)."""
    warps = threads // 32
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(32, 64 // warps, 65536 // (per_warp * warps), shared_of_multiprocessor // (shared + 1024))
    return programs * warps


def _read_amd(compiled: Any, _: str) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]

    def said(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    loads = re.findall(r"\b(?:global|buffer|flat)_load_(?!u?byte)\w+", assembly)
    stores = re.findall(r"\b(?:global|buffer|flat)_store_(?!byte)\w+", assembly)
    threads, shared = compiled.metadata.num_warps * 64, compiled.metadata.shared
    return {
        "registers": said("vgpr_count"),
        "spills": said("vgpr_spill_count") + said("sgpr_spill_count"),
        "shared": shared,
        "wide_loads": sum(load.endswith("dwordx4") for load in loads),
        "loads": len(loads),
        "wide_stores": sum(store.endswith("dwordx4") for store in stores),
        "stores": len(stores),
        "threads": threads,
        "resident": _resident_waves(said("vgpr_count"), shared, threads),
    }


def _resident_waves(registers: int, shared: int, threads: int) -> int:
    """Occupancy of CDNA 3: 4 SIMDs of 512 registers and at most 8 waves each, 64 KiB of shared memory (LDS)."""
    waves = threads // 64
    on_simds = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
    programs = min(on_simds // waves, (64 << 10) // max(shared, 1))
    return programs * waves


def compile_all() -> list[Compiled]:
    """Compile every case for every target, on all cores."""
    cases, targets = zip(*((case, target) for case in CASES for target in case.targets), strict=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_case, cases, targets))


def table(results: list[Compiled]) -> str:
    """The results as the Markdown table of docs/performance.md: one row per kernel, a dash where it is not built."""
    head = "| kernel | registers, sm_80 / 90 / 100 · gfx942 | shared memory, KiB, sm_90 · gfx942 "
    lines = [f"{head}| wide loads | wide stores | resident |", "|---|---|---|---|---|---|"]
    for kernel in dict.fromkeys(result.kernel for result in results):
        on = {result.target: result for result in results if result.kernel == kernel}
        both = [on.get(target) for target in ("sm_90", "gfx942")]
        cells = (
            kernel,
            _all_targets(on, "registers"),
            " · ".join("–" if one is None else f"{one.shared / 1024:.3g}" for one in both),
            " · ".join("–" if one is None else _share(one.wide_loads, one.loads) for one in both),
            " · ".join("–" if one is None else _share(one.wide_stores, one.stores) for one in both),
            _all_targets(on, "resident"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _all_targets(on: Mapping[str, Compiled], name: str) -> str:
    """One number per target, as in `80 / 80 / 90 · 55`."""
    *nvidia, amd = (str(getattr(on[target], name)) if target in on else "–" for target in TARGETS)
    return f"{' / '.join(nvidia)} · {amd}"


def _share(wide: int, every: int) -> str:
    """How many instructions are wide, in words where that is shorter."""
    if wide in (0, every):
        return "–" if every == 0 else "none" if wide == 0 else "all"
    return f"{wide} of {every}"


if __name__ == "__main__":
    everything = compile_all()
    as_json = "--json" in sys.argv
    print(json.dumps([dataclasses.asdict(result) for result in everything]) if as_json else table(everything))

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "cl_dist": ROOT / "cl_dist",
    "cl_dist.benchmarks": ROOT / "benchmarks",
    "cl_dist.kernels": ROOT / "kernels",
    "cl_dist.launch": ROOT / "launch",
}

FINER = {
    **dict.fromkeys(("cl_dist.config.files", "cl_dist.config.words", "cl_dist.config.ranges"), "basics"),
    "cl_dist.config.objectives": "basics",
    "cl_dist.config.plugins": "basics",
    "cl_dist.tasks.formats": "formats",
    "cl_dist.tasks.types": "formats",
    "cl_dist.progress_bar": "progress",
}
"""Parts of a package that lie below the rest of it (what a recipe may say about data follows from the formats), and
parts that are one component."""

LAYERS = [
    {
        "",
        "collective_texts",
        "errors",
        "heartbeat",
        "machine",
        "output",
        "process_end",
        "recipes",
        "seeds",
        "stop_requests",
        "time_left",
    },
    {"basics", "hub_request"},
    {"formats"},
    {"config", "kernels", "launch", "progress", "watchdog"},
    {"sharding", "models", "tasks"},
    {"engine", "methods", "evaluation", "state"},
    {"coordinator", "assembly", "export", "integrate", "planning", "report", "sweep", "tracking"},
    {"api", "benchmarks"},
    {"cli", "__main__"},
]
"""Components from the bottom up. One imports lower layers and, without a circle, its neighbours; "" is the package."""
LAYER = {component: number for number, layer in enumerate(LAYERS) for component in layer}

SETTINGS_OF_METHODS = re.compile(r"cl_dist\.methods\.(\w+\.)?(config|catalogue)")
"""The catalogue of methods, what their settings have in common, and the `config.py` of every room."""

TORCH_FREE = [
    "cl_dist",
    "cl_dist.api.loaded_run",
    "cl_dist.api.running",
    "cl_dist.methods",
    "cl_dist.methods.catalogue",
    "cl_dist.methods.protocol",
    "cl_dist.methods.composed",
    "cl_dist.config",
    "cl_dist.config.load",
    "cl_dist.tasks.formats.catalogue",
    "cl_dist.tasks.stream",
    "cl_dist.evaluation.modes",
    "cl_dist.export.check",
    "cl_dist.export.push",
    "cl_dist.state.preflight",
    "cl_dist.watchdog",
    "cl_dist.report.write",
    "cl_dist.sweep.tables",
    "cl_dist.tracking.tracker",
    "cl_dist.benchmarks.command",
    "cl_dist.cli",
]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "matplotlib")


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of every module of the product."""
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


def component(module: str) -> str:
    """`cl_dist.state.spans` -> `state`. Which methods there are and what settings they have is a part of `config`."""
    if SETTINGS_OF_METHODS.fullmatch(module):
        return "config"
    finer = next((name for prefix, name in FINER.items() if f"{module}.".startswith(f"{prefix}.")), None)
    return finer or (module.split(".")[1] if "." in module else "")


def imported(path: Path, module: str) -> Iterator[str]:
    """Names of the cl_dist modules that a file imports, at its top or inside functions."""
    names = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cl_dist")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            if node.module and node.module.split(".")[0] == "cl_dist":
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in names else node.module for name in full)


def component_graph() -> dict[str, dict[str, str]]:
    """For each component the components that it imports, each with one place where it does."""
    graph: dict[str, dict[str, str]] = defaultdict(dict)
    for module, path in modules():
        # The package itself offers names of every layer, and imports one when it is used.
        for target in imported(path, module) if module != "cl_dist" else ():
            if component(target) != component(module):
                graph[component(module)].setdefault(component(target), f"{module} imports {target}")
    return graph


def test_every_component_has_its_layer() -> None:
    assert {component(module) for module, _ in modules()} <= set(LAYER)


def test_imports_point_down() -> None:
    graph = component_graph()
    up = [graph[source][target] for source in graph for target in graph[source] if LAYER[source] < LAYER[target]]
    assert graph
    assert up == []


def test_neighbours_do_not_import_each_other_in_a_circle() -> None:
    TopologicalSorter({source: set(targets) for source, targets in component_graph().items()}).prepare()


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("kernels", {"errors"}),
        ("launch", {"", "collective_texts", "errors", "basics", "config", "machine", "output", "stop_requests"}),
    ],
)
def test_kernels_and_launch_stand_by_themselves(source: str, allowed: set[str]) -> None:
    assert {where for target, where in component_graph()[source].items() if target not in allowed} == set()


def test_only_the_command_line_starts_ranks() -> None:
    """And a benchmark: the step under ZeRO is measured on ranks of its own, also where it is run as a script. The
    Python API starts the command line."""
    users = {source for source, targets in component_graph().items() if "launch" in targets}
    assert users <= {"api", "cli", "benchmarks"}


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_checks_the_input_loads_no_framework(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    if module == "cl_dist.tasks.formats.catalogue":  # it imports the formats when it is asked for one
        code = code.replace(";", f"; {module}.builtin_formats();", 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_folder_at_the_top_level_shadows_a_package() -> None:
    code = "import importlib.util as u; print([n for n in ('benchmarks', 'kernels', 'launch') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


SHOW_MODULES = "import atexit, sys; atexit.register(lambda: print('modules:', *sys.modules, file=sys.stderr)); "
"""Reports what a process has imported by its end."""
RUN = "import sys; from cl_dist.cli import main; sys.exit(main(sys.argv[1:]))"


def top_level(code: str, *arguments: str, code_expected: int = 0, **environment: str) -> set[str]:
    """The packages that a process imports while it runs `code`."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_MODULES + code, *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == code_expected, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("modules: "))
    return {name.partition(".")[0] for name in line.split()[1:]}


def test_help_imports_next_to_nothing() -> None:
    assert not top_level(RUN, "--help") & {*HEAVY, "numpy", "pydantic", "yaml", "rich", "safetensors", "numba"}


def test_a_command_imports_no_other() -> None:
    code = "import sys; from cl_dist.cli.parser import parse; parse(['doctor']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("cl_dist.cli.")}
    assert loaded == {"cl_dist.cli.doctor", "cl_dist.cli.parser"}


def test_status_imports_neither_frameworks_nor_what_draws(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": ["a"], "world_size": 1, "zero_stage": 0}))
    loaded = top_level(RUN, "status", str(tmp_path))
    assert not loaded & {*HEAVY, "numpy", "rich", "safetensors", "numba"}


def test_the_launcher_imports_no_framework_to_check_a_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()  # the last check refuses the folder of another run
    arguments = ("run", "quickstart", "--set", f"output_dir={tmp_path}")
    loaded = top_level(RUN, *arguments, code_expected=2)
    assert not loaded & {*HEAVY, "rich", "safetensors", "numba", "nltk", "rouge_score", "lm_eval"}


UNUSED = {"datasets", "pandas", "pyarrow", "matplotlib", "nltk", "rouge_score", "sklearn", "lm_eval", "gguf"}
"""What a rank must not import unless the recipe asks for it: each takes up to a second."""


def test_a_rank_imports_only_what_every_run_needs() -> None:
    code = "import cl_dist.coordinator, deepspeed; from cl_dist.engine.distributed import quiet_libraries as q; q(0)"
    loaded = top_level(code)
    assert {"torch", "transformers", "deepspeed"} <= loaded
    assert not loaded & UNUSED


@pytest.mark.slow
def test_a_whole_run_scored_by_labels_imports_no_more(tmp_path: Path) -> None:
    changes = {
        "output_dir": str(tmp_path / "run"),
        "train.max_steps_per_task": "1",
        "stream.max_eval_samples": "4",
        "launch.processes": "1",
    }
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    loaded = top_level(RUN, "run", "quickstart", *options, **rank)
    assert "deepspeed" in loaded
    assert not loaded & UNUSED

"""The batch script that runs `cl-dist run` as a Slurm job.

The script begins with the job's requests to Slurm (`#SBATCH`) and with the job's values, all quoted. The rest
(`job.sh`) is the same for every job and reads those values. Sources: the manuals of sbatch, srun and scontrol.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from cl_dist.errors import BadInput
from cl_dist.launch.child import BOOTSTRAP
from cl_dist.launch.local import MOST_RANKS
from cl_dist.machine import DeviceSetting

DEFAULT_RESTARTS = 20
MOST_RANKS_OF_A_JOB = 1_000_000
LIMITS = {
    "nodes": (1, 100_000),
    "ranks_per_node": (1, MOST_RANKS),
    "cpus_per_rank": (1, 65_536),
    "max_restarts": (0, 100_000),
}
"""Least and largest value of each option; no cluster has more."""
MOST_DAYS = 3650
"""Longest time limit."""
WARN_SECONDS = 120
"""Slurm asks the job to stop this many seconds before its time limit, unless the job is short."""
LOG = "slurm-%j.log"
"""A job's log, in the folder that it was submitted from; Slurm replaces %j with the job id."""

_PROXIES = ("http_proxy", "https_proxy", "no_proxy")
CAPTURED = (
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "LIBRARY_PATH",
    "CPATH",
    "CC",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "PYTORCH_CUDA_ALLOC_CONF",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_CACHE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
    "XDG_CACHE_HOME",
    "CL_DIST_CACHE",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    *_PROXIES,
    *map(str.upper, _PROXIES),
)
"""Variables of the submitting shell that a run depends on. They are written into the script, because at some sites jobs
start with an empty environment. No secrets: values that contain a user name (a proxy's `user:password@host`) are left
out.
"""
CAPTURED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "FI_", "UCX_")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OPTION = re.compile(r"([a-z][a-z0-9-]*)(?:=[A-Za-z0-9_.,:;=@%+*/&|()\[\]^~-]+)?")
_TIME = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?")
_GPUS = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_.-]*:)?[0-9]{1,4}")
_PARTITIONS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,-]{0,999}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:,][A-Za-z0-9_.,:-]{0,199}")
_OWN_OPTIONS = {
    "job-name": "--job-name",
    "nodes": "--nodes",
    "gpus-per-node": "--gpus-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "time": "--time",
    "partition": "--partition",
    "signal": "--warn-seconds",
}
"""Options of sbatch that have an option of cl-dist, and its name."""
_WITHOUT_JOB = ("wait", "test-only", "help", "usage", "version")
"""Options with which sbatch does not immediately print the id of a submitted job."""
_FIXED_OPTIONS = ("ntasks", "output", "error", "open-mode", "requeue", "no-requeue", "array", "wrap", "chdir")
"""Options that the script sets, or relies on being unset."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What a job requests from Slurm and what it runs. Raises BadInput, naming the option, for invalid values."""

    name: str
    """The job's name in squeue."""
    run_folder: str
    """The run's output_dir, absolute."""
    working_folder: str
    """The working directory; relative paths in the recipe start there."""
    python: str
    """The interpreter of the environment that cl_dist is installed in."""
    arguments: Sequence[str]
    """Arguments of `cl-dist`; the script itself adds `--resume`."""
    nodes: int = 1
    gpus_per_node: int | str = 0
    """A number, or a type and a number such as `a100:4`; 0 runs the ranks on CPUs."""
    ranks_per_node: int | None = None
    """None: one per GPU, or one on CPUs."""
    cpus_per_rank: int | None = None
    """None: Slurm's default number of CPUs, divided among the ranks."""
    time: str | None = None
    """Time limit in Slurm's notation; None: the partition's."""
    partition: str | None = None
    """None: the cluster's default."""
    interface: str | None = None
    """Network interface of NCCL and Gloo; None: Gloo uses the route to the other nodes, NCCL chooses its own."""
    max_restarts: int = DEFAULT_RESTARTS
    warn_seconds: int | None = None
    """Seconds before the time limit at which Slurm asks the job to stop; 0: never; None: `default_warning`."""
    fresh: bool = False
    """Whether the job's first start moves an existing run in `run_folder` aside."""
    options: Sequence[str] = ()
    """Further options of sbatch, such as `account=physics`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the script sets (`captured_environment`)."""

    def __post_init__(self) -> None:
        """Reject what Slurm would reject or misread."""
        _check_text("--gpus-per-node", str(self.gpus_per_node), _GPUS, "a number, or a type and a number (a100:4)")
        self._check_sizes()
        _check_text("--job-name", self.name, _NAME, "up to 100 letters, digits, '-', '_' and '.'")
        _check_text("--partition", self.partition, _PARTITIONS, "partition names, separated by commas")
        _check_text(
            "--interface", self.interface, _INTERFACE,
            "interface names, separated by commas (only NCCL knows '^' and '=': set NCCL_SOCKET_IFNAME for those)",
        )  # fmt: skip
        if self.time is not None:
            seconds(self.time)
        self._check_warning()
        for option in self.options:
            _check_option(option)

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return int(str(self.gpus_per_node).rpartition(":")[2])

    @property
    def ranks_on_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or max(1, self.gpus)

    @property
    def device(self) -> DeviceSetting:
        """`launch.device` of the ranks: they insist on the GPUs that the job asks for."""
        return "cuda" if self.gpus else "cpu"

    @property
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_on_node

    @property
    def warning(self) -> int:
        """Seconds before the time limit at which Slurm asks the job to stop; 0: never."""
        return default_warning(self.time) if self.warn_seconds is None else self.warn_seconds

    def _check_sizes(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                few = "few" if value < least else "many"
                raise BadInput(
                    f"--{name.replace('_', '-')}: {value} is too {few}; it must be between {least} and {most}"
                )
        if self.gpus > MOST_RANKS:
            raise BadInput(f"--gpus-per-node: {self.gpus} is too many; at most {MOST_RANKS} are allowed")
        if self.ranks > MOST_RANKS_OF_A_JOB:
            raise BadInput(
                f"--nodes: {self.nodes} nodes with {self.ranks_on_node} ranks each make {self.ranks} ranks; at most "
                f"{MOST_RANKS_OF_A_JOB} are allowed"
            )
        if 0 < self.gpus < self.ranks_on_node:
            raise BadInput(
                f"--ranks-per-node: {self.ranks_on_node} ranks need a GPU each, but a node has only "
                f"{self.gpus} (--gpus-per-node {self.gpus_per_node}); start at most one rank per GPU"
            )

    def _check_warning(self) -> None:
        if self.warn_seconds is None:
            return
        limit = None if self.time is None else seconds(self.time)
        most = 65535 if limit is None else min(65535, limit // 2)
        if not 0 <= self.warn_seconds <= most:
            raise BadInput(
                f"--warn-seconds: {self.warn_seconds}; it must be between 0 (no warning) and {most}"
                + ("" if limit is None else ", half of --time")
            )

    def script(self) -> str:
        """The batch script."""
        body = (resources.files("cl_dist.launch") / "job.sh").read_text(encoding="utf-8")
        return "\n".join(["#!/bin/bash", *self._directives(), "set -u", "", *self._values()]) + "\n" + body

    def _directives(self) -> Iterator[str]:
        """The lines that Slurm reads. Their values are checked rather than quoted: Slurm's quoting is not bash's."""
        wanted: dict[str, object] = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.ranks_on_node,
            "cpus-per-task": self.cpus_per_rank,
            "gpus-per-node": self.gpus_per_node if self.gpus else None,
            "time": self.time,
            "partition": self.partition,
            "output": LOG,
            "open-mode": "append",
            "signal": f"B:USR1@{self.warning}" if self.warning else None,
        }
        yield from (f"#SBATCH --{name}={value}" for name, value in wanted.items() if value is not None)
        yield "#SBATCH --requeue"
        yield from (f"#SBATCH --{option}" for option in self.options)

    def _values(self) -> Iterator[str]:
        """The job's values as bash assignments."""
        yield f"python={quote(self.python)}"
        yield "# Starts Python without the working folder on its import path and calls the function named next."
        yield f"bootstrap={quote(BOOTSTRAP)}"
        yield f"arguments=({' '.join(map(quote, self.arguments))})"
        yield f"run_folder={quote(self.run_folder)}"
        yield f"working_folder={quote(self.working_folder)}"
        yield f"ranks_per_node={self.ranks_on_node}"
        yield f"max_restarts={self.max_restarts}"
        yield f"fresh={int(self.fresh)}"
        # The options win over variables of the submitting shell.
        variables = dict(self.environment)
        if self.gpus == 0:
            variables.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        if self.interface is not None:
            variables.update(GLOO_SOCKET_IFNAME=self.interface, NCCL_SOCKET_IFNAME=self.interface)
        yield from (f"export {name}={quote(value)}" for name, value in variables.items())


def captured_environment(environment: Mapping[str, str], python: str) -> dict[str, str]:
    """The submitting shell's variables that a job needs, with the folder of `python` first on PATH."""
    kept = {
        name: value
        for name, value in sorted(environment.items())
        if (name in CAPTURED or (name.startswith(CAPTURED_PREFIXES) and name.isidentifier()))
        and not _names_a_user(name, value)
    }
    # DeepSpeed calls ninja, which is next to Python in the virtual environment; that may not be activated.
    return {"PATH": os.pathsep.join([os.path.dirname(python), environment.get("PATH", os.defpath)]), **kept}


def _names_a_user(name: str, value: str) -> bool:
    """Whether a value may contain a password; others may be able to read the script."""
    return "@" in value and (name.lower() in _PROXIES or "://" in value)


def job_name(text: str) -> str:
    """`text` as a job name: characters that are not allowed become hyphens."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "run"


def quote(value: str) -> str:
    """Quote any string as one bash word on one line; BadInput for a NUL byte, which no argument can contain."""
    if "\0" in value:
        raise BadInput(f"{value!r}: neither a path nor an argument can contain a NUL byte")
    if value.isprintable():
        return shlex.quote(value)
    # Line breaks, and file names that are not UTF-8: bytes in bash's $'...' notation.
    return "$'" + "".join(map(_escaped, os.fsencode(value))) + "'"


def _escaped(byte: int) -> str:
    plain = 32 <= byte < 127 and chr(byte) not in "'\\"
    return chr(byte) if plain else f"\\x{byte:02x}"


def seconds(time: str) -> int:
    """Convert a Slurm time limit to seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes or days-hours:minutes:seconds.
    """
    match = _TIME.fullmatch(time)
    total = 0 if match is None else _seconds(*match.groups())
    if total == 0:
        raise BadInput(
            f"--time: {time!r} is not a time limit; write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    if total > 86400 * MOST_DAYS:
        raise BadInput(f"--time: {time!r} is too long; at most {MOST_DAYS} days are allowed")
    return total


def _seconds(days: str | None, *rest: str | None) -> int:
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return 86400 * int(days) + 3600 * hours + 60 * minutes + secs
    if len(parts) == 3:
        return 3600 * parts[0] + 60 * parts[1] + parts[2]
    return 60 * parts[0] + sum(parts[1:])


def default_warning(time: str | None) -> int:
    """Seconds before the limit `time` at which a job is warned: two minutes, or a quarter of a short job."""
    return WARN_SECONDS if time is None else min(WARN_SECONDS, seconds(time) // 4)


def _check_text(option: str, value: str | None, allowed: re.Pattern[str], what: str) -> None:
    if value is not None and not allowed.fullmatch(value):
        raise BadInput(f"{option}: {value!r} is not valid; allowed: {what}")


def _check_option(option: str) -> None:
    match = _OPTION.fullmatch(option)
    if match is None:
        raise BadInput(
            f"--sbatch: {option!r} is not an sbatch option; write for example --sbatch account=physics, without "
            "spaces or quotes in the value"
        )
    name = match[1]
    if name in _OWN_OPTIONS:
        raise BadInput(f"--sbatch: use {_OWN_OPTIONS[name]} to set {name}")
    if name in _WITHOUT_JOB:
        raise BadInput(f"--sbatch: with {name}, sbatch does not print the id of the job it submits; leave it out")
    if name in _FIXED_OPTIONS:
        raise BadInput(f"--sbatch: {name} cannot be set, because the script relies on its own setting; leave it out")

"""A run as a Slurm job: its batch script.

The script begins with what Slurm is asked for (`#SBATCH`) and with the job's values, each of them quoted; what follows
(`job.sh`) is the same for every job and takes the values from there. Sources: the manuals of sbatch, srun and scontrol.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from cl_dist.errors import BadInput
from cl_dist.launch.interpreter import BOOTSTRAP
from cl_dist.launch.local import MOST_RANKS

DEFAULT_RESTARTS = 20
MOST_RANKS_OF_A_JOB = 1_000_000
LIMITS = {
    "nodes": (1, 100_000),
    "ranks_per_node": (1, MOST_RANKS),
    "cpus_per_rank": (1, 65_536),
    "max_restarts": (0, 100_000),
}
"""Above what any cluster has."""
MOST_DAYS = 3650
"""Longest time limit."""
WARN_SECONDS = 120
"""How long before the time limit Slurm asks the job to stop, unless the job is short."""
LOG = "slurm-%j.log"
"""Log of a job, in the folder that it was submitted from; Slurm puts the job's number for %j."""

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
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    *_PROXIES,
    *map(str.upper, _PROXIES),
)
"""Variables of the submitting shell that a run depends on: written into the script, for sites whose jobs start with
an empty environment. Secrets are not among them, and values that name a user (a proxy's `user:password@host`) are left
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
"""Options of sbatch that an option of ours sets."""
_WITHOUT_JOB = ("wait", "test-only", "help", "usage", "version")
"""Options with which sbatch does not say at once which job it has submitted."""
_FIXED_OPTIONS = ("ntasks", "output", "error", "open-mode", "requeue", "no-requeue", "array", "wrap", "chdir")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What a job asks Slurm for, and what it runs. Raises BadInput, naming the option, for what cannot be."""

    name: str
    """Shown by squeue."""
    run_folder: str
    """The run's output_dir, absolute."""
    working_folder: str
    """Where the run starts: relative paths of the recipe start there."""
    python: str
    """The interpreter of the environment that cl_dist is installed in."""
    arguments: Sequence[str]
    """What `cl-dist` is called with; `--resume` comes from the script."""
    nodes: int = 1
    gpus_per_node: int | str = 0
    """A number, or type and number such as `a100:4`; 0: ranks on CPUs."""
    ranks_per_node: int | None = None
    """None: one for each GPU, or one on CPUs."""
    cpus_per_rank: int | None = None
    """None: the CPUs that Slurm gives by itself, divided among the ranks."""
    time: str | None = None
    """Time limit as Slurm writes it; None: the partition's."""
    partition: str | None = None
    """None: the cluster's default."""
    interface: str | None = None
    """Network interface of NCCL and Gloo; None: Gloo's is chosen by route, NCCL's by NCCL."""
    max_restarts: int = DEFAULT_RESTARTS
    warn_seconds: int | None = None
    """How long before the time limit Slurm asks the job to stop; 0: not at all; None: `default_warning`."""
    fresh: bool = False
    """Whether the job's first start puts a run in `run_folder` aside."""
    options: Sequence[str] = ()
    """Further options of sbatch, such as `account=physics`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the script sets (`captured_environment`)."""

    def __post_init__(self) -> None:
        """Refuse what Slurm would refuse, or misread."""
        _check_text("--gpus-per-node", str(self.gpus_per_node), _GPUS, "a number, or type and number such as a100:4")
        self._check_sizes()
        _check_text("--job-name", self.name, _NAME, "letters, digits, '-', '_' and '.', at most 100 of them")
        _check_text("--partition", self.partition, _PARTITIONS, "names of partitions, separated by commas")
        _check_text(
            "--interface", self.interface, _INTERFACE,
            "names of interfaces, separated by commas ('^' and '=' are for NCCL alone: set NCCL_SOCKET_IFNAME)",
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
    def ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_on_node

    @property
    def warning(self) -> int:
        """Seconds before the time limit at which Slurm asks the job to stop; 0 where it does not."""
        return default_warning(self.time) if self.warn_seconds is None else self.warn_seconds

    def _check_sizes(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                few = "few" if value < least else "many"
                raise BadInput(
                    f"--{name.replace('_', '-')}: {value} is too {few}, allowed is at least {least} and at most {most}"
                )
        if self.gpus > MOST_RANKS:
            raise BadInput(f"--gpus-per-node: {self.gpus} is too many, allowed is at most {MOST_RANKS}")
        if self.ranks > MOST_RANKS_OF_A_JOB:
            raise BadInput(
                f"--nodes: {self.nodes} nodes of {self.ranks_on_node} ranks each are {self.ranks} ranks, allowed are "
                f"at most {MOST_RANKS_OF_A_JOB}"
            )
        if 0 < self.gpus < self.ranks_on_node:
            raise BadInput(
                f"--ranks-per-node: {self.ranks_on_node} ranks do not each have a GPU of their own on a node with "
                f"--gpus-per-node {self.gpus_per_node}; allowed are at most as many"
            )

    def _check_warning(self) -> None:
        if self.warn_seconds is None:
            return
        limit = None if self.time is None else seconds(self.time)
        most = 65535 if limit is None else min(65535, limit // 2)
        if not 0 <= self.warn_seconds <= most:
            raise BadInput(
                f"--warn-seconds: {self.warn_seconds}; allowed are 0 (no warning) to {most}"
                + ("" if limit is None else ", half of --time")
            )

    def script(self) -> str:
        """The batch script."""
        body = (resources.files("cl_dist.launch") / "job.sh").read_text(encoding="utf-8")
        return "\n".join(["#!/bin/bash", *self._directives(), "set -u", "", *self._values()]) + "\n" + body

    def _directives(self) -> Iterator[str]:
        """Lines that Slurm reads; their values are checked, because Slurm's quoting is not bash's."""
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
        """The job's values as assignments of bash."""
        yield f"python={quote(self.python)}"
        yield "# Python without the working folder on its import path, calling the function that is named next."
        yield f"bootstrap={quote(BOOTSTRAP)}"
        yield f"arguments=({' '.join(map(quote, self.arguments))})"
        yield f"run_folder={quote(self.run_folder)}"
        yield f"working_folder={quote(self.working_folder)}"
        yield f"ranks_per_node={self.ranks_on_node}"
        yield f"max_restarts={self.max_restarts}"
        yield f"fresh={int(self.fresh)}"
        yield from (f"export {name}={quote(value)}" for name, value in self._variables().items())

    def _variables(self) -> dict[str, str]:
        variables = dict(self.environment)
        if self.gpus == 0:
            variables.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        if self.interface is not None:
            variables.update(GLOO_SOCKET_IFNAME=self.interface, NCCL_SOCKET_IFNAME=self.interface)
        return variables


def captured_environment(environment: Mapping[str, str], python: str) -> dict[str, str]:
    """What a job needs of the submitting shell's variables, PATH beginning with the folder of `python`."""
    kept = {
        name: value
        for name, value in sorted(environment.items())
        if (name in CAPTURED or (name.startswith(CAPTURED_PREFIXES) and name.isidentifier()))
        and not _names_a_user(name, value)
    }
    # DeepSpeed calls ninja, which lies beside Python in a virtual environment that need not be activated.
    return {"PATH": os.pathsep.join([os.path.dirname(python), environment.get("PATH", os.defpath)]), **kept}


def _names_a_user(name: str, value: str) -> bool:
    """Whether a value may hold a password: the script is a file that others may read."""
    return "@" in value and (name.lower() in _PROXIES or "://" in value)


def job_name(text: str) -> str:
    """`text` with whatever is not allowed in a job's name replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "run"


def quote(value: str) -> str:
    """`value` as one word of bash on one line, whatever it holds; BadInput for a NUL, which no argument can hold."""
    if "\0" in value:
        raise BadInput(f"{value!r}: a NUL byte can stand neither in a path nor in an argument")
    if value.isprintable():
        return shlex.quote(value)
    # Line breaks, and names of files that are no UTF-8: bytes, written as bash's $'...' has them.
    return "$'" + "".join(map(_escaped, os.fsencode(value))) + "'"


def _escaped(byte: int) -> str:
    plain = 32 <= byte < 127 and chr(byte) not in "'\\"
    return chr(byte) if plain else f"\\x{byte:02x}"


def seconds(time: str) -> int:
    """A time limit as Slurm writes it in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes or days-hours:minutes:seconds.
    """
    match = _TIME.fullmatch(time)
    total = 0 if match is None else _seconds(*match.groups())
    if total == 0:
        raise BadInput(
            f"--time: {time!r} is no time limit; write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    if total > 86400 * MOST_DAYS:
        raise BadInput(f"--time: {time!r} is too long, allowed are at most {MOST_DAYS} days")
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
    """How long before the limit `time` a job is warned: two minutes, or a quarter of a short job."""
    return WARN_SECONDS if time is None else min(WARN_SECONDS, seconds(time) // 4)


def _check_text(option: str, value: str | None, allowed: re.Pattern[str], what: str) -> None:
    if value is not None and not allowed.fullmatch(value):
        raise BadInput(f"{option}: {value!r} is not allowed; allowed are {what}")


def _check_option(option: str) -> None:
    match = _OPTION.fullmatch(option)
    if match is None:
        raise BadInput(
            f"--sbatch: {option!r} is no option of sbatch; write for example --sbatch account=physics, a value without "
            "spaces and quotes"
        )
    name = match[1]
    if name in _OWN_OPTIONS:
        raise BadInput(f"--sbatch: {name} is set by {_OWN_OPTIONS[name]}; use that")
    if name in _WITHOUT_JOB:
        raise BadInput(f"--sbatch: {name} keeps sbatch from naming the job that it submits; leave it out")
    if name in _FIXED_OPTIONS:
        raise BadInput(f"--sbatch: {name} cannot be set, because the script relies on its own; leave it out")

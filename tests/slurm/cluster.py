"""A Slurm cluster on this machine, for tests: real daemons, and nodes that can lose their power.

A node is a process in namespaces of its own (network, host name, mounts, processes) with a slurmd in it, a cable to a
bridge, and a Debian-like /etc/hosts, where its own name is a loopback address. Nothing outside of the cluster's folder
is written; killing a node's first process kills all that runs in it. As a program: `python -m tests.slurm.cluster
FOLDER` keeps a cluster until Ctrl-C and says how to talk to it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
import pytest

COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
CONTROLLER = "cldctl"
FIRST_PORT = 16817
CLUSTERS = 8
"""As many may be up at the same time."""
PATIENCE_SECONDS = 60.0

CONFIGURATION = """\
ClusterName=cldist
SlurmctldHost={controller}({network}.254)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the old credential to expire; less than 5 seconds is not believed.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdTimeout=6
SlurmctldTimeout=30
MessageTimeout=5
KillWait=20
MinJobAge=3600
ReturnToService=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Preempted jobs get the signal that they asked for with --signal, and GraceTime to act on it.
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""

NODE = """\
set -e
hostname {name}
mount --bind {folder}/hosts-{name} /etc/hosts
mount -t tmpfs -o mode=1777 shm /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add {address}/24 dev eth0
ip link set eth0 up
slurmd -D -f {folder}/slurm.conf -N {name} &
# Without slurmd the node goes on, as a machine does.
wait $! || sleep infinity
"""


def missing() -> str | None:
    """Why no cluster can be brought up here; None where it can."""
    absent = [command for command in COMMANDS if shutil.which(command, path=search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (tests/slurm/install.sh installs them)"
    if os.geteuid() != 0:
        return "a cluster's daemons and nodes need root"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def search_path() -> str:
    """PATH with the folders of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin"])


class Cluster:
    """Nodes node1, node2 and so on, with two CPUs and one pretended GPU each, and a controller.

    Args:
        folder: Everything that the cluster writes; must be on a short path, since sockets lie there.
        nodes: How many.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self._claim, self._index = _claim_index()
        self.network = f"10.213.{self._index}"
        """Of the nodes and the controller: node1 is .1, the controller .254."""
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        """For Slurm's commands."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring all up and wait until every node is idle."""
        self._clear_network()
        self._write_configuration()
        self._start_munge()
        bridge = self._bridge
        self._run("ip", "link", "add", bridge, "type", "bridge")
        self._run("ip", "address", "add", f"{self.network}.254/24", "dev", bridge)
        self._run("ip", "link", "set", bridge, "up")
        controller = f"hostname {CONTROLLER}; exec slurmctld -D -i -f {self.folder}/slurm.conf"
        self._start_daemon("slurmctld", "unshare", "--uts", "sh", "-c", controller)
        for name in self.names:
            self.start_node(name)
        self.wait_for(lambda: self.node_states() == dict.fromkeys(self.names, "idle"), "nodes that are idle")

    def stop(self) -> None:
        """End everything, whatever state it is in."""
        with suppress(subprocess.SubprocessError):
            self.ask("scancel", "--user=root")
        for name in reversed(self._daemons):
            self._kill(self._daemons[name])
        self._clear_network()
        self._claim.close()

    @property
    def _bridge(self) -> str:
        return f"cld{self._index}"

    def _cable(self, node: str) -> str:
        return f"{self._bridge}-{node}"

    def _address(self, node: str) -> str:
        return f"{self.network}.{node.removeprefix('node')}"

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        script = NODE.format(name=name, folder=self.folder, address=self._address(name))
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = self._start_daemon(name, "unshare", *namespaces, "bash", "-c", script)
        self.wait_for(lambda: self._has_own_network(process), f"the network of {name}")
        cable = self._cable(name)
        self._run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        self._run("ip", "link", "set", cable, "master", self._bridge, "up")

    def kill_node(self, name: str) -> None:
        """Cut a node's power: nothing in it can say goodbye, on the network neither."""
        self._run("ip", "link", "delete", self._cable(name))
        self._kill(self._daemons.pop(name))

    def kill_processes(self, name: str) -> None:
        """Kill a node's slurmd and all that it has started; the node stays on, and its network up."""
        node = self._daemons[name]
        network = os.readlink(f"/proc/{node.pid}/ns/net")
        (init,) = psutil.Process(node.pid).children()
        for process in psutil.process_iter():  # slurmd has the lowest number, ranks the highest
            with suppress(OSError, psutil.Error):
                inside = os.readlink(f"/proc/{process.pid}/ns/net") == network
                if inside and process.pid not in (node.pid, init.pid):
                    process.kill()

    def restart_node(self, name: str) -> None:
        """Switch a node off, if it is on, and on again; wait until Slurm gives it jobs."""
        if name in self._daemons:
            self.kill_node(name)
        self.start_node(name)
        self.wait_for(lambda: self.node_states()[name] in ("idle", "mix", "alloc"), f"return of {name}")

    def node_states(self) -> dict[str, str]:
        """State of each node in short, as sinfo has it: idle, alloc, down and so on."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def ask(self, *command: str) -> str:
        """Output of one of Slurm's commands; empty where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout if done.returncode == 0 else ""

    @staticmethod
    def wait_for(condition: object, what: str, patience: float = PATIENCE_SECONDS) -> None:
        """Wait until `condition()` is true; TimeoutError names `what` was waited for."""
        assert callable(condition)
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {patience:g} s")
            time.sleep(0.1)

    def _write_configuration(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state").mkdir()
        addresses = {name: self._address(name) for name in self.names}
        port = FIRST_PORT + 10 * self._index
        for name in self.names:
            others = [f"{address} {other}" for other, address in addresses.items() if other != name]
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", f"{self.network}.254 {CONTROLLER}", *others]
            (self.folder / f"hosts-{name}").write_text("\n".join(lines) + "\n")
        nodes = (f"NodeName={name} NodeAddr={address} CPUs=2 RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
                 for name, address in addresses.items())  # fmt: skip
        self._write_file("slurm.conf", CONFIGURATION.format(
            folder=self.folder, network=self.network, controller=CONTROLLER, port=port, node_port=port + 1,
            nodes="\n".join(nodes),
        ))  # fmt: skip
        # Detecting cgroups ends slurmd where there are none; named, the plugin does nothing.
        self._write_file("cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        self._run("mknod", str(self.folder / "gpu0"), "c", "1", "3")
        self._write_file("gres.conf", f"NodeName={','.join(self.names)} Name=gpu File={self.folder}/gpu0\n")

    def _write_file(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        socket = self.folder / "munge.socket"
        files = {"key-file": key, "socket": socket, "pid-file": self.folder / "munge.pid",
                 "log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}  # fmt: skip
        options = [f"--{name}={file}" for name, file in files.items()]
        self._start_daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        self.wait_for(socket.exists, "socket of munge")

    def _start_daemon(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self._daemons[name] = process
        return process

    @staticmethod
    def _has_own_network(process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            raise RuntimeError("a node ended as soon as it was started; see its .out file")
        ours = os.readlink("/proc/self/ns/net")
        return os.readlink(f"/proc/{process.pid}/ns/net") != ours

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        """End a daemon and, as `unshare --kill-child` does, all that is in its namespaces."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _clear_network(self) -> None:
        """Also what a cluster that was killed has left."""
        for link in (self._bridge, *map(self._cable, self.names)):
            subprocess.run(["ip", "link", "delete", link], env=self.environment, capture_output=True, check=False)

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True)


def _claim_index() -> tuple[IO[str], int]:
    """A number that no other cluster on this machine has, and the file whose lock keeps it so."""
    for index in range(CLUSTERS):
        file = Path(tempfile.gettempdir(), f"cl_dist-cluster-{index}.lock").open("a", encoding="utf-8")  # noqa: SIM115 - held
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, index
        file.close()
    raise RuntimeError(f"{CLUSTERS} clusters are up already")


@contextmanager
def running_cluster(nodes: int) -> Iterator[Cluster]:
    """A cluster that this process's Slurm commands talk to."""
    folder = Path(tempfile.mkdtemp(prefix="cld-", dir="/tmp"))  # sockets lie there: the path must be short
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("SLURM_CONF", "PATH"):
                patch.setenv(name, cluster.environment[name])
            yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main(folder: Path) -> None:
    """Keep a cluster of two nodes until Ctrl-C."""
    cluster = Cluster(folder, nodes=2)
    try:
        cluster.start()
        print(f"export SLURM_CONF={folder / 'slurm.conf'}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(missing() or main(Path(sys.argv[1]).absolute()))

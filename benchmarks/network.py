"""A network of known speed on one machine: two network namespaces, and a link between them that the kernel slows down.

A namespace lives as long as a process in it (network_namespaces(7)), and a veth pair as long as the namespaces of its
ends (veth(4)). Neither gets a name, so nothing is left behind, whoever dies and however: the process that holds a
namespace ends when its standard input does, and that is a pipe from here.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "wire0"
"""Name of the interface in each namespace."""
ADDRESSES = ("10.213.0.1", "10.213.0.2")
"""Of rank 0's and of rank 1's end. Nothing outside the two namespaces sees them."""
BURST, LATENCY = "256kb", "200ms"
"""Of the token bucket filter (tc-tbf(8)): more than the kernel hands over at once (64 KiB), and a queue long enough
that nothing is dropped while TCP finds the rate."""
_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}
"""What is called, and the package that has it."""
_SHAPER = {"tc": "iproute2"}


class Unavailable(Exception):
    """This machine cannot have such a network; the message is a sentence that says why."""


@dataclass(frozen=True)
class Link:
    """Two namespaces and what connects them."""

    holders: tuple[int, int]
    """Processes in the two namespaces."""

    @property
    def enter(self) -> list[str]:
        """The first words of a command that is run as two ranks: each of them enters its namespace, and they meet at
        rank 0's end of the link.
        """
        script = (
            'holder=$1; [ "$RANK" = 0 ] || holder=$2; shift 2; '
            f"MASTER_ADDR={ADDRESSES[0]} GLOO_SOCKET_IFNAME={INTERFACE} "
            'exec nsenter --net="/proc/$holder/ns/net" "$@"'
        )
        return ["sh", "-c", script, "sh", *map(str, self.holders)]


@contextmanager
def linked(rate: str | None = None) -> Iterator[Link]:
    """Two namespaces whose ends of the link send at most `rate` each (`400mbit`, as tc-tbf(8) writes it), or as fast as
    the machine can.

    Raises:
        Unavailable: The tools or the rights are missing.
    """
    tools = _TOOLS | (_SHAPER if rate else {})
    if missing := next((tool for tool in tools if shutil.which(tool) is None), None):
        raise Unavailable(
            f"two network namespaces need the program {missing} (package {tools[missing]}), not found here"
        )
    with ExitStack() as stack:
        first, second = (stack.enter_context(_namespace()) for _ in ADDRESSES)
        one, other = ["netns", str(first)], ["netns", str(second)]
        _run("ip", "link", "add", "name", INTERFACE, *one, "type", "veth", "peer", "name", INTERFACE, *other)
        for holder, address in zip((first, second), ADDRESSES, strict=True):
            inside = ["nsenter", f"--net=/proc/{holder}/ns/net"]
            _run(*inside, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
            _run(*inside, "ip", "link", "set", INTERFACE, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")  # rank 0 reaches its own address over it
            if rate:
                shape = ["tbf", "rate", rate, "burst", BURST, "latency", LATENCY]
                _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", *shape)
        yield Link((first, second))


def sent_bytes(interface: str = INTERFACE) -> int:
    """Bytes that an interface of this process's namespace has sent, by the kernel's own count, headers included.

    These are the numbers of `/sys/class/net/<interface>/statistics/tx_bytes`, from the file that follows the process
    into its namespace without a new mount (proc_net(5)).
    """
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, colon, counters = line.partition(":")
        if colon and name.strip() == interface:
            return int(counters.split()[8])
    raise LookupError(f"there is no network interface {interface} here")


@contextmanager
def _namespace() -> Iterator[int]:
    """A new network namespace; yields the process that holds it."""
    # In a session of its own, so that a Ctrl-C in the terminal does not end it before the ranks.
    holder = subprocess.Popen(
        ["unshare", "--net", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,  # nothing is left to be flushed into a pipe that nobody reads
    )
    with holder:  # closes the pipes and waits
        assert holder.stdin
        assert holder.stdout
        assert holder.stderr
        with suppress(BrokenPipeError):
            holder.stdin.write(b"\n")
        if not holder.stdout.readline():  # `cat` answers from inside
            raise Unavailable(_refused(["unshare", "--net"], holder.stderr.read().decode(errors="replace")))
        yield holder.pid


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(_refused(command, done.stderr))


def _refused(command: Sequence[str], complaint: str) -> str:
    words = " ".join(complaint.split()) or "it gave no reason"
    return f"two network namespaces cannot be set up here: `{' '.join(command)}` says: {words} (root can usually do it)"

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cl_dist.benchmarks.network import ADDRESSES, INTERFACE, Unavailable, linked, sent_bytes

RATE = "8mbit"
SENT = 1_000_000
SENDS = f"""
import socket, sys
if sys.argv[1] == "1":
    server = socket.create_server(({ADDRESSES[1]!r}, 5000))
    print("ready", flush=True)
    peer, left = server.accept()[0], {SENT}
    while left:
        left -= len(peer.recv(65536))
    peer.sendall(b"!")
else:
    from cl_dist.benchmarks.network import sent_bytes
    before = sent_bytes()
    with socket.create_connection(({ADDRESSES[1]!r}, 5000)) as peer:
        peer.sendall(bytes({SENT}))
        assert peer.recv(1) == b"!"
    print(sent_bytes() - before)
"""
HOLDS = """
import sys, time
from cl_dist.benchmarks.network import linked
with linked() as link:
    print(*link.holders, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def two_namespaces() -> None:
    """Skips the test where the machine cannot have them."""
    try:
        with linked(RATE):
            pass
    except Unavailable as reason:
        pytest.skip(str(reason))


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})


def answers(command: list[str], holder: int) -> Any:
    inside = ["nsenter", f"--net=/proc/{holder}/ns/net", *command]
    return json.loads(subprocess.run(inside, capture_output=True, check=True).stdout)


def has_ended(pid: int) -> bool:
    """Whether a process that is not our child ends within half a minute."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 30)[0])
    finally:
        os.close(descriptor)


def test_what_a_rank_sends_is_counted(two_namespaces: None) -> None:
    with linked(RATE) as link:
        # Both ranks are started alike, and find their namespace by their number.
        command = [*link.enter, sys.executable, "-c", SENDS]
        with start([*command, "1"], RANK="1") as server:
            assert server.stdout
            assert server.stdout.readline() == "ready\n"
            with start([*command, "0"], RANK="0") as client:
                counted = int(client.communicate()[0])
        assert (client.returncode, server.returncode) == (0, 0)
        # Headers take 66 bytes for each of at most 64 KiB, or for 1,448 bytes where the kernel cuts the data first.
        assert SENT < counted < SENT * (1 + 66 / 1448) + 5000

        # The kernel's other ways to the same counter and to the filter say the same.
        [interface] = answers(["ip", "-json", "-statistics", "link", "show", INTERFACE], link.holders[0])
        assert interface["stats64"]["tx"]["bytes"] >= counted
        for holder in link.holders:
            filters = answers(["tc", "-json", "qdisc", "show", "dev", INTERFACE], holder)
            assert [(each["kind"], each["options"]["rate"]) for each in filters] == [("tbf", 1_000_000)]


def test_nothing_is_left_when_the_measurement_fails(two_namespaces: None) -> None:
    holders: list[int] = []
    with suppress(RuntimeError), linked() as link:
        holders += link.holders
        assert all(Path(f"/proc/{holder}").exists() for holder in holders)
        raise RuntimeError
    assert len(holders) == 2
    assert not any(Path(f"/proc/{holder}").exists() for holder in holders)
    with pytest.raises(LookupError, match=INTERFACE):
        sent_bytes()  # the interface was never in the machine's own namespace


def test_nothing_is_left_when_the_benchmark_is_killed(two_namespaces: None) -> None:
    with start([sys.executable, "-c", HOLDS]) as process:
        assert process.stdout is not None
        holders = [int(word) for word in process.stdout.readline().split()]
        assert len(holders) == 2
        process.kill()
    assert all(has_ended(holder) for holder in holders)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"need the program unshare \(package util-linux\), not found here"), linked():
        pass
    # A kernel that forbids it: the program fails as it would.
    for name in ("unshare", "nsenter", "ip"):
        (tmp_path / name).write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(Unavailable, match=r"`unshare --net` says: unshare failed: Operation not permitted"), linked():
        pass

"""The store of the ranks of one machine. `tests/runs/test_interrupts.py` checks that nothing else listens."""

from __future__ import annotations

import os
import socket

import pytest

from cl_dist.engine import loopback
from cl_dist.errors import ClDistError
from tests.ranks import free_port


@pytest.mark.parametrize(
    ("address", "inside"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), ("10.0.0.1", False),
     ("0.0.0.0", False), ("node1", False), ("", False)],
)  # fmt: skip
def test_which_addresses_are_loopback_addresses(address: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", address)
    assert loopback.is_loopback(address) is inside
    assert loopback.serves_loopback() is inside
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not loopback.serves_loopback()


def test_only_the_loopback_listens_and_a_taken_port_is_named() -> None:
    port = free_port()
    with socket.socket(fileno=loopback._listen("127.0.0.1", port)) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        with pytest.raises(ClDistError, match=f"cannot meet at 127.0.0.1:{port}: EADDRINUSE: Address already in use"):
            loopback._listen("127.0.0.1", port)
        descriptors = set(os.listdir("/proc/self/fd"))
        with pytest.raises(ClDistError):
            loopback._listen("127.0.0.1", port)
        assert set(os.listdir("/proc/self/fd")) == descriptors

from __future__ import annotations

import socket

import pytest

from cl_dist.launch.hosts import address_towards, expand_nodes, interface_towards


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("gpu[03-05,12],login", ["gpu03", "gpu04", "gpu05", "gpu12", "login"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[9-10]", ["gpu9", "gpu10"]),
        ("r[1-2]-ib,x", ["r1-ib", "r2-ib", "x"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("", []),
    ],
)
def test_every_host_of_slurms_node_list(nodes: str, expected: list[str]) -> None:
    assert list(expand_nodes(nodes)) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid", ""])
def test_nothing_leads_over_the_loopback_or_to_nowhere(host: str) -> None:
    assert address_towards(host) is None
    assert interface_towards([host]) is None


def test_the_interface_is_one_that_is_there_and_has_the_address() -> None:
    address = address_towards("192.0.2.1")
    if address is None:
        pytest.skip("this machine is on no network")
    assert interface_towards(["127.0.0.1", "192.0.2.1"]) in [name for _, name in socket.if_nameindex()]
    assert interface_towards([]) is None

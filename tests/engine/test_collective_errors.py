from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cl_dist.engine.collective_errors import reporting_lost_ranks
from cl_dist.errors import ClDistError, RankLost
from cl_dist.heartbeat import beat
from tests.ranks import REPOSITORY, free_port, rank_environment
from tests.test_collective_texts import LOST, SYSTEM, TIMEOUT

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33024"
TIMED_OUT = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation"
)


def reported(error: Exception) -> tuple[str, list[str]]:
    """The message raised for `error`, and the reasons that `give_up` was called with."""
    given_up: list[str] = []

    def give_up(reason: str, traceback: str) -> str:
        given_up.append(reason)
        assert str(error) in traceback
        return f"{reason}; stacks are there"

    beat("training task a, step 3")
    with pytest.raises(RankLost) as caught, reporting_lost_ranks(2, 5.0, give_up):
        raise error
    return str(caught.value), given_up


def test_a_lost_rank() -> None:
    message, given_up = reported(RuntimeError(CLOSED))
    assert message.startswith("rank 2 lost another rank, which has ended or cannot be reached, while training task a, ")
    assert given_up == []


@pytest.mark.parametrize(("text", "detail"), LOST)
def test_every_wording_of_a_lost_rank(text: str, detail: str | None) -> None:
    message, given_up = reported(torch.distributed.DistBackendError(text))
    shown = f" ({detail})" if detail else ""
    assert f"cannot be reached, while training task a, step 3{shown}; continue from" in message
    assert given_up == []


def test_nccl_that_waited_too_long() -> None:
    text = f"NCCL communicator was aborted on rank 2.  Original reason for failure was: {TIMEOUT}"
    message, given_up = reported(torch.distributed.DistBackendError(text))
    assert len(given_up) == 1
    assert "rank 2 waited longer than 5 s (launch.timeout_seconds) for the others while training task a" in message


@pytest.mark.parametrize("what", ["uncorrectable ECC error encountered", "uncorrectable NVLink error detected during"])
def test_a_broken_gpu_is_a_lost_rank(what: str) -> None:
    message, given_up = reported(RuntimeError(f"CUDA error: {what}\nCUDA kernel errors might be asynchronously"))
    expected = f"rank 2 lost its GPU while training task a, step 3: CUDA error: {what}; continue from the last saved"
    assert message.startswith(expected)
    assert given_up == []


def test_too_little_shared_memory_is_an_error_that_says_how_to_mend_it() -> None:
    text = SYSTEM + "Error while creating shared memory segment /dev/shm/nccl-cjY8K5 (size 10617216), error: No space"
    with (
        pytest.raises(ClDistError, match="--shm-size") as caught,
        reporting_lost_ranks(0, 5.0, lambda reason, _: reason),
    ):
        raise torch.distributed.DistBackendError(text)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError(TIMED_OUT), torch.distributed.DistStoreError("wait timeout after 5000ms, keys: /0")]
)
def test_one_that_takes_too_long(error: Exception) -> None:
    message, given_up = reported(error)
    reason = "rank 2 waited longer than 5 s (launch.timeout_seconds) for the others while training task a, step 3"
    assert (message, given_up) == (f"{reason}; stacks are there", [reason])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("the connection to the database timed out"),
        torch.distributed.DistNetworkError("The server socket has failed to listen, name: EADDRINUSE"),
    ],
)
def test_other_errors_are_let_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reporting_lost_ranks(0, 5.0, lambda reason, _: reason):
        raise error
    assert caught.value is error


def test_a_rank_that_nobody_joins() -> None:
    code = """
from cl_dist.engine.distributed import join
from cl_dist.errors import ClDistError, RankLost
try:
    join(timeout_seconds=2)
except RankLost as error:
    print(error)
"""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **rank_environment(0, 2, port)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = (
        f"rank 0 waited longer than 2 s (launch.timeout_seconds) for the others while meeting at 127.0.0.1:{port}"
    )
    assert done.stdout.strip() == expected

"""The wording of collective operations' errors, as PyTorch 2.11 to 2.13, NCCL 2.14 to 2.28 and Gloo print them."""

from __future__ import annotations

import pytest

from cl_dist.collective_texts import is_collective, meaning, nccl_detail

ERROR = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/"
REMOTE = (
    f"{ERROR}NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.21.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\n"
)
SYSTEM = (
    f"{ERROR}NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
    "Last error:\n"
)
COMPLETION = "NET/IB: Got completion from peer 10.153.235.13<40554> with status=IBV_WC_RETRY_EXC_ERR(12) opcode=0"
ABORTED = "NCCL communicator was aborted on rank 2. "
STORE = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: "
)
WATCHDOG = (
    "[rank0]:[E709 17:05:38.083402482 ProcessGroupNCCL.cpp:1899] [PG ID 0 PG GUID 0(default_pg) Rank 0] Process group "
    "watchdog thread terminated with exception: "
)
TIMEOUT = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=20585, OpType=ALLREDUCE, NumelIn=1259621, "
    "NumelOut=1259621, Timeout(ms)=600000) ran for 600000 milliseconds before timing out."
)

PASSING = (
    "[rank0]:[E ProcessGroupNCCL.cpp:542] [Rank 0] Collective WorkNCCL(SeqNum=89, OpType=ALLREDUCE, Timeout(ms)=90000) "
    "raised the following async exception: NCCL error: remote process exited or there was a network error\n"
    "[rank0]:[E ProcessGroupNCCL.cpp:1795] Exception (either an error or timeout) detected by watchdog at work: 89\n"
    "[rank0]:[E ProcessGroupNCCL.cpp:577] [Rank 0] Some NCCL operations have failed or timed out. Due to the "
    "asynchronous nature of CUDA kernels, subsequent GPU operations might run on corrupted/incomplete data.\n"
)
"""What torch's watchdog of NCCL prints when another machine is gone, before the error itself."""
INFO = (
    "node1:110:697 [0] NCCL INFO NCCL_IB_TIMEOUT set by environment to 22.\n"
    "node1:110:698 [0] NCCL INFO [Service thread] Connection closed by localRank 0\n"
)

LOST = [
    (PASSING + WATCHDOG + REMOTE + "socketProgress: Connection closed by remote peer node2<55912>",
     "socketProgress: Connection closed by remote peer node2<55912>"),
    (f"{ERROR}ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.18.3\nncclInternalError: Internal check failed."
     "\nLast error:\nSocket recv failed while polling for opId=0x200ad80fbbd0",
     "Socket recv failed while polling for opId=0x200ad80fbbd0"),
    ("NCCL WARN socketStartConnect: Connect to 10.0.0.2<45763> failed : Software caused connection abort",
     "NCCL WARN socketStartConnect: Connect to 10.0.0.2<45763> failed : Software caused connection abort"),
    (REMOTE + "socketProgressOpt: Call to recv from 172.16.4.1<33759> failed : Connection reset by peer",
     "socketProgressOpt: Call to recv from 172.16.4.1<33759> failed : Connection reset by peer"),
    (REMOTE + "NET/IB : Got completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129",
     "NET/IB : Got completion from peer 11.214.147.122<39138> with error 12, opcode 0, len 0, vendor err 129"),
    (REMOTE + COMPLETION, COMPLETION),
    (REMOTE + "NET/OFI Request 0x7f14cc5b60c0 completed with error. RC: 113. Error: 2 (UNDELIVERABLE).",
     "NET/OFI Request 0x7f14cc5b60c0 completed with error. RC: 113. Error: 2 (UNDELIVERABLE)."),
    (f"{ERROR}ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\nncclInternalError: Internal check failed."
     "\nLast error:\nNet : Connection closed by remote peer user<50260>",
     "Net : Connection closed by remote peer user<50260>"),
    (SYSTEM + "socketStartConnect: Connect to 10.0.0.1<47861> failed : Connection refused",
     "socketStartConnect: Connect to 10.0.0.1<47861> failed : Connection refused"),
    (SYSTEM + "Call to connect returned Connection timed out, retrying",
     "Call to connect returned Connection timed out, retrying"),
    (SYSTEM + "Call to connect returned No route to host", "Call to connect returned No route to host"),
    (ABORTED, "NCCL communicator was aborted on rank 2."),
    (ABORTED + " Original reason for failure was: NCCL error: remote process exited or there was a network error",
     "NCCL communicator was aborted on rank 2.  Original reason for failure was: NCCL error: remote process exited or "
     "there was a network error"),
    (STORE + "Connection reset by peer", None),
    (STORE + "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
     None),
    ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33024", None),
    ("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:1: Connection reset by peer", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "detail"), LOST)
def test_a_lost_rank(text: str, detail: str | None) -> None:
    assert (meaning(text), nccl_detail(text)) == ("lost", detail)
    assert is_collective(text)


@pytest.mark.parametrize(
    "text",
    [
        WATCHDOG + TIMEOUT,
        INFO + PASSING.splitlines()[-1] + WATCHDOG + TIMEOUT,
        ABORTED + " Original reason for failure was: " + TIMEOUT,
        "NCCL timeout in communicator initialization.",
        STORE + "wait timeout after 600000ms, keys: /default_pg/0//cuda//0",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv "
        "operation",
    ],
)
def test_one_that_takes_too_long(text: str) -> None:
    assert meaning(text) == "timed out"
    assert is_collective(text)


def test_too_little_shared_memory_is_not_a_lost_rank() -> None:
    text = SYSTEM + "Error while creating shared memory segment /dev/shm/nccl-cjY8K5 (size 10617216), error: No space"
    assert meaning(text) == "shared memory"


@pytest.mark.parametrize(
    "text",
    [
        f"{ERROR}ProcessGroupNCCL.cpp:1287, invalid usage, NCCL version 2.17.1\n"
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 50",
        f"{ERROR}NCCLUtils.cpp:77, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        f"{ERROR}ProcessGroupNCCL.cpp:3763, internal error - please report this issue to the NCCL developers",
        f"{ERROR}ProcessGroupNCCL.cpp:1251, internal error, NCCL version 2.18.6\nncclInternalError: Internal check "
        "failed.\nLast error:\nBootstrap : no socket interface found",
        SYSTEM + "Call to socket failed : Too many open files",
        INFO + "terminate called after throwing an instance of 'std::length_error'",
    ],
)
def test_other_errors_of_nccl(text: str) -> None:
    assert meaning(text) is None

"""Which signal ends a rank at once; repeated signals of a scheduler do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cl_dist.stop_requests import StopRequests
from tests.ranks import REPOSITORY

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(
    ("signals", "ends_with_the_last"),
    [
        ([(INT, 0.0)], False),
        ([(INT, 0.0), (INT, 0.4)], False),
        ([(INT, 0.0), (INT, 0.6)], True),
        ([(INT, 0.0), (INT, 0.4), (INT, 0.6)], True),
        ([(TERM, 0.0), (TERM, 4.9)], False),
        ([(TERM, 0.0), (TERM, 5.1)], True),
        ([(TERM, 0.0), (TERM, 3.0), (TERM, 6.0)], True),
        ([(USR1, 0.0), (USR1, 4.9)], False),
        ([(USR1, 0.0), (USR1, 60.0)], True),
        ([(USR1, 0.0), (TERM, 60.0)], False),
        ([(USR1, 0.0), (USR1, 1.0), (TERM, 60.0), (TERM, 61.0)], False),
        ([(USR1, 0.0), (TERM, 60.0), (TERM, 66.0)], True),
        ([(USR1, 0.0), (TERM, 60.0), (USR1, 66.0)], True),
        ([(USR1, 0.0), (TERM, 1.0), (TERM, 7.0)], True),
        ([(TERM, 0.0), (USR1, 1.0), (TERM, 60.0)], False),
        ([(TERM, 0.0), (INT, 1.0)], False),
        ([(USR1, 0.0), (INT, 60.0), (INT, 61.0)], True),
        ([(INT, 0.0), (TERM, 1.0), (INT, 2.0)], True),
        ([(INT, 0.0), (TERM, 6.0)], True),
    ],
)
def test_which_signal_is_a_second_request(signals: list[tuple[int, float]], ends_with_the_last: bool) -> None:
    requests = StopRequests()
    assert not requests.asked
    for number, now in signals[:-1]:
        assert not requests.ends_at_once(number, 1000.0 + now)
        assert requests.asked
    number, now = signals[-1]
    assert requests.ends_at_once(number, 1000.0 + now) is ends_with_the_last


BODY = """
import time
from cl_dist.engine.stop import StopRequest
StopRequest()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_that_receives_signals() -> None:
    """USR1 and the TERM after it do not end the process; a second Ctrl-C does."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", BODY], env=environment, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in (USR1, TERM, INT):
            process.send_signal(number)
            time.sleep(0.7)
            assert process.poll() is None
        process.send_signal(INT)
        assert process.wait(timeout=30) == 128 + INT

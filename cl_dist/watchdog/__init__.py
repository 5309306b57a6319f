"""Ends a job that makes no progress: names the rank that blocks it, and leaves every rank's stacks behind.

It needs neither the process group nor the main thread, which are what hangs: its own threads check the age of the last
mark of progress (`cl_dist.heartbeat`), and the ranks exchange those ages through small files in the run folder.

`peers.py` holds what the ranks know about each other and who is to blame, `watch.py` the watchdog itself.
"""

from cl_dist.watchdog.watch import End, Watchdog

__all__ = ["End", "Watchdog"]

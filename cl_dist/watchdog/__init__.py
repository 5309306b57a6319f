"""Ends a job that makes no progress: names the rank that holds it up and leaves every rank's stacks behind.

Works without the process group and without the main thread, which are what hangs: threads of its own look at the age of
the last mark (`cl_dist.heartbeat`), and the ranks tell each other theirs through small files in the run folder.
"""

from cl_dist.watchdog.watch import End, Watchdog

__all__ = ["End", "Watchdog"]

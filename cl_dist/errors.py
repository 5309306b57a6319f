"""The ways a run can end early, each with the exit code that scripts rely on."""


class ClDistError(Exception):
    """A failure that is told to the user as one sentence; exit code 1."""

    exit_code = 1


class BadInput(ClDistError):
    """The recipe, the data, the model folder or the run folder is not usable; says what, where and what is allowed."""

    exit_code = 2


class JobFailed(ClDistError):
    """The job as a whole cannot go on; the message names the rank that it is about, whoever tells it."""


class RankLost(JobFailed):
    """A rank is gone, out of reach or makes no progress, through no fault of the recipe's that this rank knows of.

    Exit code 76 (EX_PROTOCOL): a batch script may start the job again from the last saved state.
    """

    exit_code = 76


class Interrupted(ClDistError):
    """The run was asked to stop and has saved its state; `--resume` goes on. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75

"""The ways in which a run can fail, each with the exit code that scripts rely on."""


class ClDistError(Exception):
    """A failure that is reported to the user in one sentence; exit code 1."""

    exit_code = 1


class BadInput(ClDistError):
    """The recipe, the data, the model or the run folder cannot be used; the message says what, where, and what is
    allowed. Exit code 2.
    """

    exit_code = 2


class JobFailed(ClDistError):
    """The whole job cannot continue; the message itself names the rank in question, whichever rank prints it."""


class RankLost(JobFailed):
    """A rank is gone, unreachable or makes no progress, and as far as this rank knows the recipe is not the cause.

    Exit code 76 (EX_PROTOCOL): a batch script may restart the job from the last saved state.
    """

    exit_code = 76


class Interrupted(ClDistError):
    """The run was asked to stop and has saved its state; `--resume` continues it. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75

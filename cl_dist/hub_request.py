"""One short request to the Hugging Face Hub: whether it has a model or a data set for us, and what its answer means.

The libraries ask for each file, on every rank, and repeat requests that nobody answers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

from cl_dist.config.words import shorten

ANSWER_SECONDS = 20.0
"""Longest wait for the Hub's answer, resolving its name and all of its addresses included. `HF_HUB_ETAG_TIMEOUT`
(10 s) limits a single connection."""
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def meaning(status: int, hub: str) -> str:
    """What an HTTP status of the Hub means, and what to do."""
    if status == 401:
        return f"{hub} refuses the token; set HF_TOKEN to a valid one, or repeat `hf auth login`"
    if status == 403:
        return f"{hub} does not let this token read it; {LOG_IN} with one that may"
    why = "too many requests came from this address" if status == 429 else "which is its own problem"
    return f"{hub} answered with status {status}, {why}; try again later"


class NotTheHub(Exception):
    """Something answered in the Hub's place."""


def ask(name: str, file: str, kind: Literal["model", "dataset"] = "model") -> BaseException | None:
    """Ask the Hub for one file of a model or data set; return what went wrong. Takes at most `ANSWER_SECONDS`."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    def metadata() -> None:
        address = hf_hub_url(name, file, repo_type=kind)
        answer = get_hf_file_metadata(address, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if answer.commit_hash is None:
            raise NotTheHub(
                f"what answers at {constants.ENDPOINT} is not Hugging Face; check HF_ENDPOINT and the proxy "
                "(HTTPS_PROXY), or use a local folder"
            )

    return attempt(metadata)


def attempt(request: Callable[[], None]) -> BaseException | None:
    """Make a request to the Hub and return what went wrong. Takes at most `ANSWER_SECONDS`."""
    outcome: list[BaseException | None] = []

    def answer() -> None:
        try:
            request()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # Resolving a name cannot be given a limit, and every address of it gets its own.
    thread = threading.Thread(target=answer, daemon=True)
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would announce what the message says
    thread.start()
    thread.join(ANSWER_SECONDS)
    logger.setLevel(level)
    return outcome[0] if outcome else TimeoutError(f"no answer within {ANSWER_SECONDS:g} s")


def nobody_answered(problem: BaseException | None) -> bool:
    """Whether no answer came, from the Hub or from anybody else."""
    from huggingface_hub.errors import HfHubHTTPError

    return problem is not None and not isinstance(problem, HfHubHTTPError | NotTheHub)


def gist(problem: BaseException) -> str:
    """The problem in a few words."""
    text = " ".join(str(problem).split())
    return shorten(text or type(problem).__name__, 120)

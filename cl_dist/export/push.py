"""Uploads an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_dist.config.words import show_path
from cl_dist.errors import BadInput, ClDistError
from cl_dist.hub_request import LOG_IN, attempt, gist


def check_push(name: str) -> None:
    """Raise BadInput unless the Hub lets this user write a model called `name`; asks the Hub once.

    Args:
        name: `owner/name`, or a name below the user's own account.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__ there

    where = f"--push {show_path(name)}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"{where}: not a name on the Hub; allowed: OWNER/NAME") from error
    if constants.is_offline_mode():
        raise BadInput(f"{where}: HF_HUB_OFFLINE forbids any upload; unset it")
    if get_token() is None:
        raise BadInput(f"{where}: nobody is logged in; {LOG_IN}")
    found: dict[str, Any] = {}
    problem = attempt(lambda: found.update(HfApi().whoami()))
    if problem is not None:
        raise BadInput(f"{where}: {_reason(problem, constants.ENDPOINT)}") from problem
    owner, _, rest = name.partition("/")
    owners = [str(found.get("name")), *(str(each.get("name")) for each in found.get("orgs", ()))]
    if rest and owner not in owners:
        raise BadInput(f"{where}: this token cannot write there; allowed owners: {', '.join(owners)}")


def push(folder: Path, name: str) -> str:
    """Upload `folder` as the model `name`, which is created as a private one if it does not exist; return its address.

    Raises:
        ClDistError: The Hub refused it or could not be reached. The folder is complete all the same.
    """
    from huggingface_hub import HfApi, constants, utils

    quiet: bool = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]  # no __all__ there
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        created = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Exported by cl_dist")
    except Exception as error:  # of several libraries: HTTP, xet, and those of the Hub
        raise ClDistError(
            f"--push {name}: {_reason(error, constants.ENDPOINT)}; the model is in {folder}, upload it later with "
            f"`hf upload {name} {folder}`"
        ) from error
    finally:
        if not quiet:
            utils.enable_progress_bars()  # type: ignore[attr-defined]
    return str(created)


def _reason(problem: BaseException, hub: str) -> str:
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status == 401:
        return f"{hub} refuses the token; set HF_TOKEN to a valid one, or repeat `hf auth login`"
    if status == 403:
        return f"{hub} does not let this token write there; {LOG_IN} with one that may"
    if status is not None:
        return f"{hub} answered with status {status} ({gist(problem)})"
    if isinstance(problem, OSError | TimeoutError) or type(problem).__module__.startswith(("httpx", "httpcore")):
        return f"{hub} cannot be reached ({gist(problem)})"
    return f"the upload failed ({type(problem).__name__}: {gist(problem)})"

"""The Hugging Face Hub as seen from here: whether it has the recipe's model for us, and what to do if it has not.

Loading a model asks the Hub about each of its files, on every rank, and waits for every answer. So one short request
comes first: it finds what is wrong before any rank starts, and if nobody answers while the model is in this machine's
cache, the run uses the cache without asking again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cl_dist.config.files import is_folder
from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import did_you_mean, show_path
from cl_dist.errors import BadInput
from cl_dist.hub_request import LOG_IN, NotTheHub, ask, gist, meaning, nobody_answered
from cl_dist.models.check import check_folder, local_folder


def check_published(model: ModelConfig, notify: Callable[[str], None] | None = None) -> None:
    """Raise BadInput if the recipe names a model on the Hub that cannot be loaded from here; ask the Hub once.

    If the Hub cannot be reached and the model is in the cache, `HF_HUB_OFFLINE` is set for this process and those that
    it starts, and `notify` is called with a sentence that says so.
    """
    name = model.name_or_path
    if name in BUILTIN_FAMILIES or local_folder(name) is not None:
        return
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__ there

    where = f"model.name_or_path: {show_path(name)}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"{where} is neither a folder nor a Hugging Face id (owner/name){_similar(name)}") from error
    cached = _cached(model)
    problem = None if constants.is_offline_mode() else ask(name, model.gguf_file or "config.json")
    if cached is None:
        if problem is not None or constants.is_offline_mode():
            raise BadInput(f"{where} {explain(problem, model)}") from problem
        return
    if constants.is_offline_mode() or nobody_answered(problem):
        check_folder(cached, model)
        if problem is not None:
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True
            if notify is not None:
                unreachable = f"{constants.ENDPOINT} cannot be reached ({gist(problem)})"
                notify(f"{unreachable}; {name} is loaded from the cache, {cached}")
    # With any other problem (no access any more, an overloaded Hub), the libraries use the cache by themselves.
    elif problem is not None and not isinstance(problem, HfHubHTTPError):
        raise BadInput(f"{where} {explain(problem, model)}") from problem


def explain(problem: BaseException | None, model: ModelConfig) -> str:
    """What an error about a model on the Hub means and what to do: the end of a sentence about the model.

    problem: the error of `huggingface_hub`; None if it was not asked, because `HF_HUB_OFFLINE` is set.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import DisabledRepoError, EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    name, hub = model.name_or_path, constants.ENDPOINT
    if constants.is_offline_mode():
        return (
            f"is neither a folder here nor in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids asking "
            f"{hub}{_similar(name)}; unset it, or {_bring(name)}"
        )
    if isinstance(problem, GatedRepoError):
        then = LOG_IN if get_token() is None else "wait until its owner lets you in, with a token that may read it"
        return f"is gated: accept its licence at {hub}/{name}, then {then}"
    if isinstance(problem, DisabledRepoError):
        return f"has been disabled on {hub}; use another model"
    if isinstance(problem, RepositoryNotFoundError):
        other = "use a token of an account that may read it" if get_token() is not None else LOG_IN
        return (
            f"is neither a folder here nor a model on {hub}{_similar(name)}; check the name; if it is private, {other}"
        )
    if isinstance(problem, EntryNotFoundError):
        hint = "" if model.gguf_file is not None else "; if it holds GGUF files, name one in model.gguf_file"
        return f"has no file {model.gguf_file or 'config.json'} on {hub}{hint}"
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status is not None:
        return f"cannot be loaded: {meaning(status, hub)}, or {_bring(name)}"
    if isinstance(problem, NotTheHub):
        return f"cannot be loaded: {problem}"
    reason = "" if problem is None else f" ({gist(problem)})"
    return f"is no folder here, and {hub} cannot be reached{reason}{_similar(name)}; {_bring(name)}"


def hub_problem(error: BaseException) -> BaseException | None:
    """The Hub's error behind one of transformers, which reworded it; None if there is none."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    found, seen = None, set[int]()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        found = step if isinstance(step, kinds) else found  # the innermost one says most
        step = step.__cause__ or step.__context__
    return found


def _bring(name: str) -> str:
    return (
        f"run `hf download {name} --local-dir FOLDER` where there is a network and set model.name_or_path to the folder"
    )


def _cached(model: ModelConfig) -> Path | None:
    """The model's folder in the Hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name_or_path, model.gguf_file or "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _similar(name: str) -> str:
    return did_you_mean(name, _names(name))


def _names(name: str) -> Iterator[str]:
    """Names that may have been meant: built-in models, folders next to where this one would be, the cache's models."""
    from huggingface_hub import constants

    yield from BUILTIN_FAMILIES
    parent = Path(name).parent
    for folder, prefix in ((parent, ""), (Path(constants.HF_HUB_CACHE), "models--")):
        if is_folder(folder):
            entries = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())  # false for a link to itself
            if prefix:
                yield from (n.removeprefix(prefix).replace("--", "/") for n in entries if n.startswith(prefix))
            else:
                yield from (str(parent / entry) for entry in entries)

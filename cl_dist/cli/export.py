"""`cl-dist export`: writes a saved model as a plain Hugging Face folder, and uploads it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from cl_dist.cli.parser import Help
from cl_dist.export.check import check_export
from cl_dist.export.push import check_push, push
from cl_dist.models.hub import check_published
from cl_dist.progress import waiting
from cl_dist.state.saved_models import find_saved

_DESCRIPTION = """\
Write the model that a run has saved into a folder that transformers loads without cl_dist (an adapter: transformers and
peft), with its tokenizer, its generation settings and a model card. docs/export.md has more.
"""
_EPILOG = """\
examples:
  cl-dist export runs/mine --out tuned            the model after the last task
  cl-dist export runs/mine --task billing --out tuned
  cl-dist export runs/lora --merge --out tuned    adapter and base model as one
  cl-dist export runs/mine --out tuned --push me/tuned
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `export`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "export", parents=[common], description=_DESCRIPTION, epilog=_EPILOG, formatter_class=Help
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument("--task", metavar="NAME", help="the model after this task (default: the last finished one)")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into its base model")
    parser.add_argument(
        "--push", metavar="ID", help="upload the folder to the Hugging Face Hub; a new model there is private"
    )
    parser.set_defaults(command=export, works=lambda parsed: True)


def export(arguments: Namespace) -> int:
    """Check everything that is cheap to check, write the folder, upload it."""
    saved = find_saved(Path(arguments.run), arguments.task)
    check_export(saved, arguments.out, merge=arguments.merge)
    if arguments.push is not None:
        check_push(arguments.push)

    def notify(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if saved.is_adapter:
        check_published(saved.recipe.model, notify)
    with waiting("importing torch and transformers"):
        from cl_dist.export.folder import write_export

    with waiting("writing the model"):
        write_export(saved, arguments.out, merge=arguments.merge, notify=notify)
    print(f"wrote the model after {saved.task} to {arguments.out}")
    if arguments.push is not None:
        with waiting("uploading the model"):
            address = push(arguments.out, arguments.push)
        print(f"uploaded it to {address}")
    return 0

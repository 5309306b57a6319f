"""`cl-dist completion`: the scripts work in the shells that are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cl_dist.cli.completion import SHELLS
from tests.cli.conftest import Command

BASH = """
source "$1"
complete_words() {
  COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
  _shtab_cl_dist
  echo "${COMPREPLY[@]}"
}
complete_words cl-dist re
complete_words cl-dist run qui
complete_words cl-dist run my
complete_words cl-dist status r
complete_words cl-dist recipe --ex
complete_words cl-dist completion z
"""
CHECKS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "tcsh": ["tcsh", "-f"]}


def test_bash_completes_commands_recipes_files_folders_and_options(command: Command, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(command("completion", "bash")[1])
    for name in ("my.yaml", "my.yml", "my.txt", "quirks.txt"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    done = subprocess.run(["bash", "-c", BASH, "bash", "./script"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "recipe report", "quickstart", "my.yaml my.yml", "runs", "--explain", "zsh"
    ]  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_of_its_shell(command: Command, tmp_path: Path, shell: str) -> None:
    code, script, error = command("completion", shell)
    assert (code, error) == (0, "")
    assert "superni-order1" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    done = subprocess.run([*CHECKS[shell], "script"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_shell_of_another_kind_is_refused(command: Command) -> None:
    code, _, error = command("completion", "dos")
    assert code == 2
    assert "invalid choice: 'dos'" in error

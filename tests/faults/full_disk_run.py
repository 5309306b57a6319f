"""Run by test_full_disk.py in its own mount namespace: a run on a small disk that fills up, its resume, and an
undisturbed run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.test_kill_and_resume import recipe
from tests.zygote import Zygote


def main(folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    path, zygote = recipe(disk), Zygote()
    fault = {"moment": "full disk", "on_rank": 1, "count": 2}
    full = zygote.run(["run", str(path)], folder, world=2, fault=fault)
    manifest = json.loads((disk / "run" / "manifest.json").read_text())
    kept = sorted(file.name for file in (disk / "run" / "checkpoint").iterdir())
    (disk / "filler").unlink()
    resumed = zygote.run(["run", str(path), "--resume", "--debug"], folder, world=2)
    (folder / "undisturbed").mkdir()
    undisturbed = zygote.run(["run", str(recipe(folder / "undisturbed")), "--debug"], folder, world=2)
    zygote.close()
    shutil.copytree(disk / "run", folder / "run")
    result: dict[str, Any] = {"full": full, "manifest": manifest, "kept": kept}
    result |= {"resumed": resumed, "undisturbed": undisturbed}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

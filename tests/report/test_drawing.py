"""Drawing primitives; test_pictures has whole pictures."""

from __future__ import annotations

import json
import subprocess
import sys

from cl_dist.report.drawing import short


def test_labels_are_short() -> None:
    assert short("dbpedia") == "dbpedia"
    assert short("a$b") == r"a\$b"
    assert short("x" * 30) == "x" * 30
    assert short("start-of-a-name-that-is-too-long-for-it") == "start-of-a-nam…oo-long-for-it"


def test_drawing_needs_neither_a_display_nor_pyplot() -> None:
    code = (
        "import json, sys\n"
        "from cl_dist.report import pictures\n"
        "before = 'matplotlib' in sys.modules\n"
        "png = pictures.scores(['a'], [[0.5], [1.0]]).render()['png']\n"
        "print(json.dumps([before, 'matplotlib.pyplot' in sys.modules, 'torch' in sys.modules, len(png) > 1000]))"
    )
    environment = {"PATH": "", "MPLBACKEND": "TkAgg", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [False, False, False, True]

"""`cl-dist export --push`: huggingface_hub is the real one, and asks a server of ours, as HF_ENDPOINT tells it to."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.export.runs import write_run

EXPORT = """
import contextlib, io, json, sys
from cl_dist.cli import main
found = []
for token, arguments in json.loads(sys.argv[1]):
    import os
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload, by token: `good` may write, `reader` may not, `bad` is none, `full` fails late."""

    uploaded: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        if self.token == "bad":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path != "/api/whoami-v2":
            return self._answer(404, {"error": "Repository not found"})
        return self._answer(200, {"type": "user", "name": "me", "orgs": [{"name": "lab"}], "auth": {}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.path == "/api/repos/create":
            if self.token == "reader":
                return self._answer(403, {"error": "You don't have the rights to create a model"})
            self.created.append(json.loads(body))
            address = f"http://{self.headers['Host']}/me/tuned"
            return self._answer(200, {"url": address, "name": "me/tuned", "id": "me/tuned"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if self.token == "full":
            return self._answer(507, {"error": "No space left"})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(
            200,
            {
                "commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "hookOutput": "",
            },
        )

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_folder_is_uploaded_or_one_line_says_why_not(endpoint: str, tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", "builtin:llama-tiny", done=1))
    calls = [
        ("good", "me/tuned"), ("bad", "me/tuned"), ("good", "you/tuned"), ("good", "a b"), ("", "me/tuned"),
        ("reader", "me/tuned"), ("full", "me/tuned"),
    ]  # fmt: skip
    commands = [
        (token, ["export", run, "--out", str(tmp_path / f"out-{n}"), "--push", name])
        for n, (token, name) in enumerate(calls)
    ]
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, json.dumps(commands)],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    good, bad, elsewhere, no_name, nobody, reader, full = json.loads(done.stdout.splitlines()[-1])
    assert good[0] == 0, good[2]
    assert f"uploaded it to {endpoint}/me/tuned" in good[1]
    assert Hub.created[0]["visibility"] == "private"
    local = {path.name: path.read_bytes() for path in (tmp_path / "out-0").iterdir()}
    assert Hub.uploaded == local
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= local.keys()

    # What can be known is known before anything is written.
    refused = [
        (bad, f"--push me/tuned: {endpoint} refuses the token; set HF_TOKEN to a valid one, or repeat `hf auth login`"),
        (elsewhere, "--push you/tuned: this token cannot write there; allowed owners: me, lab"),
        (no_name, "--push a b: not a name on the Hub; allowed: OWNER/NAME"),
        (nobody, "--push me/tuned: nobody is logged in; log in with `hf auth login` or set HF_TOKEN"),
    ]
    for number, ((code, _, error), message) in enumerate(refused, start=1):
        assert (code, error) == (2, f"cl-dist: error: {message}\n")
        assert not (tmp_path / f"out-{number}").exists()

    # The rest leaves a complete folder, and says how to upload it later.
    for number, (code, _, error) in ((5, reader), (6, full)):
        assert code == 1
        assert error.count("\n") == 1
        assert f"upload it later with `hf upload me/tuned {tmp_path}/out-{number}`" in error
        assert (tmp_path / f"out-{number}" / "model.safetensors").exists()
    assert "does not let this token write there" in reader[2]
    assert "answered with status 507" in full[2]

"""Flower's own programs, as this server uses them: `flwr` with its answers in JSON, and the app that runs send."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightcl.errors import Failure, RequestError, one_line
from server.link.folder import ServerFolder, write_private

CONNECTION = "fleet"
"""The name of this server in Flower's configuration."""
ANSWER_SECONDS = 60.0
MARK = "LIGHTCL_SERVER_PROCESS"
"""An environment variable that every process of a server carries, with the server's folder as its value."""

_PROJECT = """\
[project]
name = "lightcl-fleet"
version = "{version}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lightcl"

[tool.flwr.app.components]
serverapp = "fleet_server:app"
clientapp = "fleet_client:app"

[tool.flwr.app.config]
scenario = "quickstart"
set = ""
out = ""
resume = false
"""
_MODULE = '"""Both ends run the code that is installed there."""\n\nfrom {module} import app\n\n__all__ = ["app"]\n'


class FlowerError(Failure):
    """Flower refused a request, or does not answer. The text is Flower's."""


@dataclass(frozen=True)
class Node:
    """A SuperNode that is registered: online, offline or only registered; `seen` is when that changed."""

    number: str
    status: str
    seen: str


class Flower:
    """`flwr` for the SuperLink that listens on `port` of this machine."""

    def __init__(self, folder: ServerFolder, port: int) -> None:
        self.folder = folder
        self.environment = environment(folder)
        lines = [f"[superlink.{CONNECTION}]", f'address = "127.0.0.1:{port}"']
        secure = f"root-certificates = {json.dumps(str(folder.authority))}"
        lines.append("insecure = true" if folder.settings.insecure else secure)
        write_private(folder.path / "flower" / "config.toml", "\n".join(lines) + "\n")

    def answers(self) -> bool:
        """Whether the SuperLink takes requests."""
        try:
            self._call("supernode", "list", CONNECTION)
        except FlowerError:
            return False
        return True

    def nodes(self) -> dict[str, Node]:
        """The registered SuperNodes by their number."""
        found = {}
        for row in self._call("supernode", "list", CONNECTION)["nodes"]:
            online = row["status"] == "online"
            seen = row["online-at"] if online else row["offline-at"]
            if row["status"] != "unregistered":
                found[row["node-id"]] = Node(row["node-id"], row["status"], "" if seen == "N/A" else seen)
        return found

    def register(self, public_key: str) -> str:
        """Lets the SuperNode with this key in (OpenSSH's format); returns its number."""
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "key.pub"
            file.write_text(public_key + "\n")
            return str(self._call("supernode", "register", str(file), CONNECTION)["node-id"])

    def unregister(self, node: str) -> None:
        self._call("supernode", "unregister", node, CONNECTION)

    def start(self, config: Mapping[str, str | bool]) -> str:
        """Starts a run with these values of the app's configuration; returns its number."""
        import tomli_w

        app = write_app(self.folder)
        file = self.folder.path / "flower" / "run-config.toml"
        write_private(file, tomli_w.dumps(dict(config)))
        return str(self._call("run", str(app), CONNECTION, "--run-config", str(file))["run-id"])

    def status(self, run: str) -> tuple[str, str]:
        """pending, starting, running or finished:... of a run, and details; "unknown" where Flower has forgotten it."""
        try:
            rows = self._call("list", CONNECTION, "--run-id", run)["runs"]
        except FlowerError as error:
            if "not found" in str(error).lower():
                return "unknown", ""
            raise
        return str(rows[0]["status"]), str(rows[0]["status-details"] or "")

    def stop(self, run: str) -> None:
        """Ends a run, whether it is still going or not."""
        try:
            self._call("stop", run, CONNECTION)
        except FlowerError as error:
            if not any(word in str(error).lower() for word in ("finished", "not found", "stopped")):
                raise

    def _call(self, *arguments: str) -> dict[str, Any]:
        """One `flwr` command. Raises FlowerError."""
        command = [program("flwr", self.environment), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=self.environment, cwd=self.folder.path, capture_output=True, text=True,
                timeout=ANSWER_SECONDS, stdin=subprocess.DEVNULL, start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FlowerError(f"flwr {arguments[0]}: no answer in {ANSWER_SECONDS:g} s") from error
        try:
            answer = json.loads(done.stdout)
        except ValueError as error:
            text = one_line(done.stderr or done.stdout or f"exit code {done.returncode}")
            raise FlowerError(f"flwr {arguments[0]}: {text}") from error
        if not isinstance(answer, dict) or not answer.get("success"):
            text = answer.get("error-message", "") if isinstance(answer, dict) else done.stdout
            raise FlowerError(f"flwr {arguments[0]}: {one_line(str(text))}")
        return answer


def environment(folder: ServerFolder) -> dict[str, str]:
    """The environment of Flower's programs: files in the server's folder, no telemetry, our Python first."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(folder.path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        MARK: str(folder.path),
    }


def program(name: str, environment: Mapping[str, str]) -> str:
    """The path of one of Flower's programs. Raises RequestError."""
    found = shutil.which(name, path=environment["PATH"])
    if found is None:
        raise RequestError(f"{name} is not installed beside {sys.executable}; run: pip install lightcl-fleet")
    return found


def write_app(folder: ServerFolder) -> Path:
    """The app that Flower sends: two modules that name the code which is installed on the server and on the boards."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("lightcl-fleet")
    except PackageNotFoundError:  # a checkout on the path
        number = "0.0.0"
    app = folder.path / "app"
    app.mkdir(exist_ok=True)
    for name, text in (
        ("pyproject.toml", _PROJECT.format(version=number)),
        ("fleet_server.py", _MODULE.format(module="server.app")),
        ("fleet_client.py", _MODULE.format(module="client.app")),
    ):
        write_private(app / name, text)
    return app

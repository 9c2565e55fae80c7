"""Engines that are not Docker's, each a real HTTP server on a real Unix socket.

`FakeEngine` makes up its answers and makes no container. `ProxyEngine` hands everything on to the real
engine, and changes what passes through as a test says.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

IMAGE = "sha256:" + "1" * 64
CONTAINER = "c" * 64

JsonObject = dict[str, Any]


def no_change(_path: str, message: JsonObject) -> JsonObject:
    """Hand it on as it is."""
    return message


@dataclass
class FakeEngine:
    """What it answers, and what it was asked."""

    info: JsonObject
    version: JsonObject
    warnings: list[str] = field(default_factory=list)
    """In the answer to a creation."""
    inspected: Callable[[JsonObject], JsonObject] = lambda body: body
    """From a faithful answer about a container to the one that is given."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request, without the version of the API."""
    _containers: dict[str, JsonObject] = field(default_factory=dict)

    def answer(self, method: str, path: str, query: str, body: JsonObject) -> tuple[int, object]:
        """Status and JSON of the answer."""
        self.asked.append(f"{method} {path}")
        match method, path.strip("/").split("/"):
            case "GET", ["_ping"]:
                return 200, "OK"
            case "GET", ["version"]:
                return 200, self.version
            case "GET", ["info"]:
                return 200, self.info
            case "GET", ["images", _, "json"]:
                return 200, {"Id": IMAGE}
            case "GET", ["containers", "json"]:
                return 200, []
            case "POST", ["containers", "create"]:
                self._containers[unquote(query).partition("name=")[2]] = body
                return 201, {"Id": CONTAINER, "Warnings": self.warnings}
            case "POST", ["containers", name, "start"] if name in self._containers:
                return 204, None
            case "GET", ["containers", name, "json"] if name in self._containers:
                return 200, self.inspected(faithful(self._containers[name]))
            case "DELETE", ["containers", name] if self._containers.pop(name, None):
                return 204, None
        return 404, {"message": f"no such thing: {method} {path}"}

    def left(self) -> list[str]:
        """Names of containers that were created and not removed."""
        return sorted(self._containers)


def faithful(body: Mapping[str, Any]) -> JsonObject:
    """What an engine that did as it was told says of a running container."""
    host_config = {"MaskedPaths": ["/proc/kcore"], "ReadonlyPaths": ["/proc/sys"], **body["HostConfig"]}
    return {
        "Id": CONTAINER,
        "Config": {name: value for name, value in body.items() if name != "HostConfig"},
        "HostConfig": host_config,
        "State": {"Status": "running", "Running": True, "Pid": 0, "OOMKilled": False, "ExitCode": 0},
    }


@dataclass
class ProxyEngine:
    """Between a client and the real engine."""

    real: str = "/var/run/docker.sock"
    request: Callable[[str, JsonObject], JsonObject] = no_change
    """From path and JSON body of a request to the body that is handed on."""
    response: Callable[[str, JsonObject], JsonObject] = no_change
    """Likewise for the JSON object of an answer."""

    def hand_on(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        """The real engine's answer."""
        path = urlsplit(target).path
        if body:
            body = json.dumps(self.request(path, json.loads(body))).encode()
        with closing(HTTPConnection("engine")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(60)
            connection.sock.connect(self.real)
            connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            text = answer.read()
        if text.startswith(b"{"):
            text = json.dumps(self.response(path, json.loads(text))).encode()
        return answer.status, text


@contextmanager
def serving(
    engine: FakeEngine | ProxyEngine, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> Iterator[None]:
    """The engine at the address that the environment names, for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if isinstance(engine, ProxyEngine):
                status, text = engine.hand_on(self.command, self.path, body)
            else:
                target = urlsplit(self.path)
                parts = target.path.split("/")
                path = "/".join(["", *parts[2:]]) if parts[1].startswith("v1.") else target.path
                status, answer = engine.answer(
                    self.command, path, target.query, json.loads(body) if body else {}
                )
                text = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status != 204:
                self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if status != 204:
                self.wfile.write(text)

        do_GET = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - the base class looks for these

        def log_message(self, *_: object) -> None:
            """Silent."""

    class Server(ThreadingUnixStreamServer):
        daemon_threads = True

        def get_request(self) -> tuple[Any, Any]:
            connection, _ = super().get_request()
            return connection, ("engine", 0)  # the base class of the handler wants a pair

    path = directory / "engine.sock"
    with Server(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink()

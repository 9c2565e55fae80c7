import json
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import engine, image_id, settings, state_dir

__all__ = ["engine", "image_id", "settings", "state_dir"]

_HERE = Path(__file__).parent
_TIMEOUT_S = 30

WINDOW_TOKENS = 8_192


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this directory need the model, and time."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.local_model)
            item.add_marker(pytest.mark.timeout(180))


@dataclass(frozen=True)
class Counted:
    """What the server has counted since it started."""

    prompt_tokens: int
    generated_tokens: int

    def since(self, before: "Counted") -> "Counted":
        """The difference."""
        return Counted(
            self.prompt_tokens - before.prompt_tokens, self.generated_tokens - before.generated_tokens
        )


@dataclass(frozen=True)
class LocalModel:
    """The server, seen from outside."""

    url: str
    key: str

    def counted(self) -> Counted:
        """From its own metrics, which no client of ours has a part in."""
        metrics = dict(
            line.split() for line in self._ask("/metrics").splitlines() if line and not line.startswith("#")
        )
        processed, cached, generated = (
            int(float(metrics[f"llamacpp:{name}_total"]))
            for name in ("prompt_tokens", "prompt_tokens_cached", "tokens_predicted")
        )
        return Counted(processed + cached, generated)

    def busy_slots(self) -> int:
        """How many calls it is answering."""
        return sum(bool(slot["is_processing"]) for slot in json.loads(self._ask("/slots")))

    def count_tokens(self, prompt: str) -> int:
        """What it says a sub-call with this prompt has as input."""
        body = {"model": "any", "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]}
        counted = json.loads(self._ask("/v1/messages/count_tokens", body))
        return int(counted["input_tokens"])

    def _ask(self, path: str, body: Any = None) -> str:
        headers = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - our own server
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            return str(response.read().decode())


@pytest.fixture(scope="session")
def local_model() -> Iterator[LocalModel]:
    key = secrets.token_hex(16)
    command = [sys.executable, "-m", "tests.local_model.server", key, str(WINDOW_TOKENS)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            pytest.fail("the local model does not start: run `make test-local-model`", pytrace=False)
        try:
            yield LocalModel(url, key)
        finally:
            server.stdin.close()
            server.wait(_TIMEOUT_S)

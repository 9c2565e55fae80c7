"""An unchanged Anthropic SDK against `rlm serve` as a process, with real containers and a scripted model."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from docker import DockerClient

from orchestrator.config import Settings
from tests.containers import containers_of
from tests.e2e.serving import new_key, serving
from tests.e2e.test_service import SCRIPT
from tests.fakes.service import short_directory

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]

LINE = "One line of a long report, of which there are many.\n"
TWENTY_MB = LINE * (20_000_000 // len(LINE))


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def asks(model: str) -> dict[str, Any]:
    content = [{"type": "text", "text": TWENTY_MB}, {"type": "text", "text": "How long is it?"}]
    return {"model": model, "max_tokens": 1_000, "messages": [{"role": "user", "content": content}]}


def asked_sync(url: str, key: str, model: str, *, streams: bool) -> anthropic.types.Message:
    with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as client:
        if streams:
            with client.messages.stream(**asks(model)) as stream:
                return stream.get_final_message()
        message: anthropic.types.Message = client.messages.create(**asks(model))
        return message


async def asked_async(url: str, key: str, model: str, *, streams: bool) -> anthropic.types.Message:
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as client:
        if streams:
            async with client.messages.stream(**asks(model)) as stream:
                return await stream.get_final_message()
        message: anthropic.types.Message = await client.messages.create(**asks(model))
        return message


async def test_a_prompt_of_20_mb_is_answered_sync_and_async_streaming_and_not(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    async with serving(directory, settings, SCRIPT) as server:
        key, url = await new_key(directory), f"http://{server.http}"
        model = f"scripted:{directory / 'script.py'}"
        messages = await asyncio.gather(
            asyncio.to_thread(asked_sync, url, key, model, streams=False),
            asyncio.to_thread(asked_sync, url, key, model, streams=True),
            asked_async(url, key, model, streams=False),
            asked_async(url, key, model, streams=True),
        )
        for message in messages:
            (block,) = message.content
            assert block.type == "text"
            said, characters, _number = block.text.split()
            assert (said, int(characters)) == ("fine", len(TWENTY_MB))
            assert message.stop_reason == "end_turn"
            assert message.usage.output_tokens > 0
    assert not containers_of(engine, directory / "state")

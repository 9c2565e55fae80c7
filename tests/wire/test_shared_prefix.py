from orchestrator.conversation import Told
from orchestrator.models.anthropic_client import AnthropicClient
from orchestrator.models.port import ModelRequest
from orchestrator.models.sdk import anthropic_api
from tests.fakes import anthropic_server as fake

SHARED = "the same instructions and the same document " * 500


def sub_call(text: str, cached_chars: int) -> ModelRequest:
    return ModelRequest(
        model="m",
        system="",
        conversation=(Told(text, cached_chars),),
        python_tool=False,
        max_tokens=100,
        timeout_s=20,
    )


async def test_sub_calls_read_from_the_cache_what_the_first_of_them_wrote() -> None:
    async with fake.serve(lambda _body: fake.Say("ok")) as server:
        client = AnthropicClient(anthropic_api("key", server.url))
        usages = [
            (await client.complete(sub_call(f"{SHARED}question {number}", len(SHARED)))).usage
            for number in range(3)
        ]
        await client.aclose()
    assert (usages[0].cache_write > 5_000, usages[0].cache_read) == (True, 0)
    assert [usage.cache_read for usage in usages[1:]] == [usages[0].cache_write] * 2
    assert [usage.cache_write for usage in usages[1:]] == [0, 0]


async def test_a_prompt_that_is_all_shared_or_not_at_all_is_one_block() -> None:
    async with fake.serve(lambda _body: fake.Say("ok")) as server:
        client = AnthropicClient(anthropic_api("key", server.url))
        for cached_chars in (0, len(SHARED), 10 * len(SHARED)):
            await client.complete(sub_call(SHARED, cached_chars))
        await client.aclose()
    assert [len(served.body["messages"][0]["content"]) for served in server.log] == [1, 1, 1]

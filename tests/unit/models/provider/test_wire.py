import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm_proto.v1 import provider_pb2 as pb

from orchestrator.conversation import Block, CellReport, Entry, Reply, StopReason, Told, ToolReport
from orchestrator.errors import (
    Billing,
    InvalidRequestError,
    KeyMissingError,
    MachineError,
    ModelError,
    OrchestratorError,
)
from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.models.provider import wire
from orchestrator.pricing import Usage

words = st.text(st.characters(codec="utf-8"), max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
text_blocks = st.builds(lambda text: {"type": "text", "text": text}, words)
# Fields that nobody knows yet, and a text block that has more than text.
other_blocks = st.builds(
    lambda kind, more: {**more, "type": kind},
    st.sampled_from(["text", "thinking", "tool_use", "new"]),
    st.dictionaries(words, json_values, max_size=3),
)
blocks: st.SearchStrategy[Block] = text_blocks | other_blocks
replies = st.builds(Reply, st.lists(blocks, max_size=4).map(tuple), st.sampled_from(StopReason))
entries: st.SearchStrategy[Entry] = (
    st.builds(Told, words, st.integers(0, 2**40))
    | st.builds(ToolReport, words, words, st.booleans())
    | replies
)
requests = st.builds(
    ModelRequest,
    model=words,
    system=words,
    conversation=st.lists(entries, max_size=5).map(tuple),
    python_tool=st.booleans(),
    max_tokens=st.integers(1, 2**40),
    timeout_s=st.floats(0.001, 1e6),
    stop_sequences=st.lists(words, max_size=2).map(tuple),
)
counts = st.integers(0, 100_000_000)
completions = st.builds(Completion, replies, st.builds(Usage, counts, counts, counts, counts))


@given(requests)
def test_a_request_arrives_as_it_was_sent(request: ModelRequest) -> None:
    sent = wire.model_call(7, request).SerializeToString()
    call = pb.ToProvider.FromString(sent).call
    assert call.id == 7
    assert wire.request_of(call) == request


@given(completions)
def test_a_reply_arrives_as_it_was_said(completion: Completion) -> None:
    sent = wire.completed(7, completion).SerializeToString()
    told = pb.FromProvider.FromString(sent).completed
    assert told.id == 7
    assert wire.completion_of(told) == completion


@pytest.mark.parametrize("billing", Billing)
@pytest.mark.parametrize("retryable", [False, True])
@pytest.mark.parametrize(("retry_after_s", "status"), [(None, None), (0.0, 529), (1.5, None)])
def test_a_failure_arrives_with_its_price_and_its_hope(
    billing: Billing, retryable: bool, retry_after_s: float | None, status: int | None
) -> None:
    failure = ModelError(
        "no", billing=billing, retryable=retryable, retry_after_s=retry_after_s, status=status
    )
    told = pb.FromProvider.FromString(wire.failed(7, failure).SerializeToString()).failed
    again = wire.failure_of(told)
    assert (str(again), vars(again)) == (str(failure), vars(failure))


def test_lone_surrogates_become_question_marks_one_for_one() -> None:
    odd = "a\udcffb\ud800"
    request = ModelRequest(
        model=odd,
        system=odd,
        conversation=(
            CellReport(odd, 2),
            ToolReport(odd, odd),
            Reply(({"type": "x", "y": odd},), StopReason.OTHER),
        ),
        python_tool=False,
        max_tokens=1,
        timeout_s=1.0,
        stop_sequences=(odd,),
    )
    arrived = wire.request_of(wire.model_call(1, request).call)
    even = "a?b?"
    assert (arrived.model, arrived.system, arrived.stop_sequences) == (even, even, (even,))
    assert arrived.conversation == (
        Told(even, 2),
        ToolReport(even, even),
        Reply(({"type": "x", "y": even},), StopReason.OTHER),
    )


@pytest.mark.parametrize(
    "call",
    [
        pb.ModelCall(conversation=[pb.ModelCallEntry()]),
        pb.ModelCall(system=b"\xff"),
        pb.ModelCall(conversation=[pb.ModelCallEntry(reply=pb.ModelReply(stop_reason="because"))]),
        pb.ModelCall(
            conversation=[
                pb.ModelCallEntry(
                    reply=pb.ModelReply(blocks=[pb.ReplyBlock(json=b"[]")], stop_reason="end_turn")
                )
            ]
        ),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(call: pb.ModelCall) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of whichever decoder
        wire.request_of(call)


@pytest.mark.parametrize(
    "platform",
    [
        None,
        Bedrock(region="eu-west-1", profile="p"),
        Vertex(region="eu", project_id="p"),
        Foundry(resource="mine"),
    ],
)
def test_a_platform_arrives(platform: Platform | None) -> None:
    told = wire.open_provider("http://host", platform).open
    assert told.base_url == "http://host"
    assert wire.platform_of(told) == platform


def test_a_platforms_credentials_stay_where_they_are() -> None:
    secret = "of the platform"  # noqa: S105 - a test's
    for platform in (
        Bedrock(region="r", bearer_token=secret, secret_access_key=secret, session_token=secret),
        Vertex(region="r", project_id="p", access_token=secret),
        Foundry(resource="mine", api_key=secret),
    ):
        assert secret.encode() not in wire.open_provider("http://host", platform).SerializeToString()


@pytest.mark.parametrize("kind", [KeyMissingError, InvalidRequestError, MachineError])
def test_a_refusal_arrives_as_what_it_was(kind: type[OrchestratorError]) -> None:
    again = wire.refusal(wire.refused(kind("why")).refused)
    assert (type(again), str(again)) == (kind, "why")


@pytest.mark.case("D07")
def test_a_call_cannot_say_where_it_goes_what_it_carries_or_what_tools_there_are() -> None:
    """Whatever the orchestrator was talked into: these fields are all there is."""
    assert {field.name for field in pb.ModelCall.DESCRIPTOR.fields} == {
        *(
            "id",
            "model",
            "system",
            "conversation",
            "python_tool",
            "max_tokens",
            "timeout_s",
            "stop_sequences",
        ),
    }
    assert {field.name for field in pb.ToldText.DESCRIPTOR.fields} == {"text", "cached_chars"}
    assert {field.name for field in pb.ToolCallReport.DESCRIPTOR.fields} == {"call_id", "text", "is_error"}

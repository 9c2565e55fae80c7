"""What goes between orchestrator and provider process, in messages and in ours. No I/O.

A ModelRequest and a Completion come out as they went in, with one exception: lone surrogates, which are no
Unicode and which no provider takes, become `?` on the way, one for one.
"""

import json
from collections.abc import Iterable

from rlm_proto.v1 import provider_pb2 as pb

from orchestrator.conversation import Block, Entry, Reply, StopReason, Told, ToolReport
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
from orchestrator.pricing import Usage

_JUST_TEXT = {"type", "text"}

_ERROR_OF_KIND: dict["pb.ProviderRefused.Kind.ValueType", type[OrchestratorError]] = {
    pb.ProviderRefused.KIND_KEY_MISSING: KeyMissingError,
    pb.ProviderRefused.KIND_INVALID_REQUEST: InvalidRequestError,
    pb.ProviderRefused.KIND_MACHINE: MachineError,
}


# --- Opening -------------------------------------------------------------------------------------------


def open_provider(base_url: str, platform: Platform | None) -> pb.ToProvider:
    """Where calls go. Credentials that a platform may hold are left out."""
    told = pb.OpenProvider(base_url=_sendable(base_url))
    match platform:
        case Bedrock():
            told.bedrock.CopyFrom(pb.BedrockPlatform(region=platform.region, profile=platform.profile))
        case Vertex():
            told.vertex.CopyFrom(pb.VertexPlatform(region=platform.region, project_id=platform.project_id))
        case Foundry():
            told.foundry.CopyFrom(pb.FoundryPlatform(resource=platform.resource))
        case None:
            pass
    return pb.ToProvider(open=told)


def platform_of(told: pb.OpenProvider) -> Platform | None:
    """The platform, without credentials."""
    match told.WhichOneof("platform"):
        case "bedrock":
            return Bedrock(region=told.bedrock.region, profile=told.bedrock.profile)
        case "vertex":
            return Vertex(region=told.vertex.region, project_id=told.vertex.project_id)
        case "foundry":
            return Foundry(resource=told.foundry.resource)
        case _:
            return None


def refused(error: OrchestratorError) -> pb.FromProvider:
    """Why nothing can be sent."""
    kinds = (kind for kind, of_kind in _ERROR_OF_KIND.items() if isinstance(error, of_kind))
    kind = next(kinds, pb.ProviderRefused.KIND_MACHINE)
    return pb.FromProvider(refused=pb.ProviderRefused(kind=kind, message=str(error)))


def refusal(told: pb.ProviderRefused) -> OrchestratorError:
    """The same, to be raised."""
    return _ERROR_OF_KIND.get(told.kind, MachineError)(told.message)


# --- Calls ---------------------------------------------------------------------------------------------


def model_call(call_id: int, request: ModelRequest) -> pb.ToProvider:
    """A call."""
    call = pb.ModelCall(
        id=call_id,
        model=_sendable(request.model),
        system=_bytes(request.system),
        conversation=map(_entry, request.conversation),
        python_tool=request.python_tool,
        max_tokens=request.max_tokens,
        timeout_s=request.timeout_s,
        stop_sequences=map(_bytes, request.stop_sequences),
    )
    return pb.ToProvider(call=call)


def request_of(call: pb.ModelCall) -> ModelRequest:
    """The call's request.

    Raises:
        ValueError: It makes no sense.
    """
    return ModelRequest(
        model=call.model,
        system=call.system.decode(),
        conversation=tuple(map(_entry_of, call.conversation)),
        python_tool=call.python_tool,
        max_tokens=call.max_tokens,
        timeout_s=call.timeout_s,
        stop_sequences=tuple(text.decode() for text in call.stop_sequences),
    )


def cancel(call_id: int) -> pb.ToProvider:
    """The end of a call."""
    return pb.ToProvider(cancel=pb.CancelModelCall(id=call_id))


# --- Replies -------------------------------------------------------------------------------------------


def completed(call_id: int, completion: Completion) -> pb.FromProvider:
    """A call's reply."""
    usage = completion.usage
    told = pb.ModelCallCompleted(
        id=call_id,
        reply=_reply(completion.reply),
        input_tokens=usage.input,
        cache_read_tokens=usage.cache_read,
        cache_write_tokens=usage.cache_write,
        output_tokens=usage.output,
    )
    return pb.FromProvider(completed=told)


def completion_of(told: pb.ModelCallCompleted) -> Completion:
    """The reply.

    Raises:
        ValueError: It makes no sense.
    """
    usage = Usage(told.input_tokens, told.cache_read_tokens, told.cache_write_tokens, told.output_tokens)
    return Completion(_reply_of(told.reply), usage)


def failed(call_id: int, error: ModelError) -> pb.FromProvider:
    """A call's failure."""
    told = pb.ModelCallFailed(
        id=call_id,
        message=str(error),
        may_be_billed=error.billing is not Billing.NOTHING,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        status=error.status,
    )
    return pb.FromProvider(failed=told)


def failure_of(told: pb.ModelCallFailed) -> ModelError:
    """The same, to be raised."""
    return ModelError(
        told.message,
        billing=Billing.UNKNOWN if told.may_be_billed else Billing.NOTHING,
        retryable=told.retryable,
        retry_after_s=told.retry_after_s if told.HasField("retry_after_s") else None,
        status=told.status if told.HasField("status") else None,
    )


# --- Conversations -------------------------------------------------------------------------------------


def _entry(entry: Entry) -> pb.ModelCallEntry:
    match entry:
        case Reply():
            return pb.ModelCallEntry(reply=_reply(entry))
        case ToolReport():
            return pb.ModelCallEntry(
                report=pb.ToolCallReport(
                    call_id=_sendable(entry.call_id), text=_bytes(entry.text), is_error=entry.is_error
                )
            )
        case Told():
            # Of a CellReport too: which texts may be elided is the loop's business and not the provider's.
            return pb.ModelCallEntry(
                told=pb.ToldText(text=_bytes(entry.text), cached_chars=entry.cached_chars)
            )


def _entry_of(entry: pb.ModelCallEntry) -> Entry:
    match entry.WhichOneof("entry"):
        case "reply":
            return _reply_of(entry.reply)
        case "report":
            report = entry.report
            return ToolReport(report.call_id, report.text.decode(), report.is_error)
        case "told":
            return Told(entry.told.text.decode(), entry.told.cached_chars)
        case _:
            raise ValueError("an entry of no kind")


def _reply(reply: Reply) -> pb.ModelReply:
    return pb.ModelReply(blocks=map(_block, reply.content), stop_reason=reply.stop.value)


def _reply_of(reply: pb.ModelReply) -> Reply:
    return Reply(tuple(_blocks_of(reply.blocks)), StopReason(reply.stop_reason))


def _block(block: Block) -> pb.ReplyBlock:
    text = block.get("text")
    if block.keys() == _JUST_TEXT and block["type"] == "text" and isinstance(text, str):
        return pb.ReplyBlock(text=_bytes(text))
    return pb.ReplyBlock(json=_bytes(json.dumps(block, default=dict, ensure_ascii=False)))


def _blocks_of(blocks: Iterable[pb.ReplyBlock]) -> Iterable[Block]:
    for block in blocks:
        if block.HasField("text"):
            yield {"type": "text", "text": block.text.decode()}
            continue
        value = json.loads(block.json)
        if not isinstance(value, dict):
            raise ValueError("a block that is no object")  # noqa: TRY004 - of the message, not of an argument
        yield value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _sendable(text: str) -> str:
    return _bytes(text).decode()

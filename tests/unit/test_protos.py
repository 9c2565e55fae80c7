import re
from collections.abc import Iterator
from typing import Any

import pytest
from rlm_proto.v1 import broker_pb2, sandbox_pb2

FORBIDDEN = {
    *("tenant", "run", "depth", "parent", "identity", "caller", "user", "account", "owner", "session"),
    *("url", "uri", "host", "header", "headers", "metadata", "key", "token", "secret", "tool", "tools"),
    *("budget", "limit", "quota", "cost", "price", "usage", "deadline", "priority", "role", "system"),
}
"""What a guest must not be able to say: who it is, where to send, what it may spend or has spent."""

RPCS = [
    method
    for file in (broker_pb2, sandbox_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def fields_below(message: Any, seen: set[str] | None = None) -> Iterator[Any]:
    seen = set() if seen is None else seen
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from fields_below(field.message_type, seen)


def test_there_are_rpcs_to_look_at() -> None:
    assert sorted(method.name for method in RPCS) == [
        "Attach",
        "Complete",
        "GetBudget",
        "StartChildRun",
        "UploadContext",
    ]


@pytest.mark.case("H01", "H02", "H09")
@pytest.mark.parametrize("method", RPCS, ids=lambda method: method.name)
def test_no_guest_can_say_who_it_is_or_what_it_may_spend(method: Any) -> None:
    for field in fields_below(method.input_type):
        words = set(re.split(r"[_\d]+", field.name))
        assert not words & FORBIDDEN, field.full_name


@pytest.mark.parametrize("method", RPCS, ids=lambda method: method.name)
def test_a_guest_sends_text_as_bytes_but_for_what_is_ascii_by_nature(method: Any) -> None:
    """Python text may hold lone surrogates, which a proto string refuses."""
    strings = {field.name for field in fields_below(method.input_type) if field.type == field.TYPE_STRING}
    assert strings <= {"call_id", "model", "upload_id"}


@pytest.mark.parametrize("method", RPCS, ids=lambda method: method.name)
def test_no_guest_message_takes_anything_of_any_type(method: Any) -> None:
    for field in fields_below(method.input_type):
        if field.message_type is not None:
            assert field.message_type.full_name.startswith("rlm_proto.v1."), field.full_name
            assert not field.message_type.GetOptions().map_entry, field.full_name


@pytest.mark.case("D07")
def test_what_a_sub_call_can_say_is_exactly_this() -> None:
    """A new field here is a decision about isolation, not an addition."""
    assert {field.name for field in broker_pb2.CompleteRequest.DESCRIPTOR.fields} == {
        "call_id",
        "prompt",
        "model",
        "max_tokens",
        "shared_prefix_bytes",
    }
    assert {field.name for field in broker_pb2.StartChildRunRequest.DESCRIPTOR.fields} == {
        *("call_id", "question", "inline", "range", "paths", "files", "upload_id", "max_tokens")
    }

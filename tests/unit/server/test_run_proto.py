import re
from collections.abc import Iterator
from typing import Any

import pytest
from rlm_proto.v1 import run_pb2

METHODS = list(run_pb2.DESCRIPTOR.services_by_name["RunService"].methods)
CLAIMS = {"tenant", "owner", "user", "caller", "account", "role", "path", "url", "home"}
"""What no client may say: whose something is, or where it is on the server."""


def fields_below(message: Any) -> Iterator[Any]:
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from fields_below(field.message_type)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_request_says_whose_it_is_or_where(method: Any) -> None:
    for field in fields_below(method.input_type):
        assert not set(field.name.split("_")) & CLAIMS, field.full_name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_no_answer_tells_where_something_is_on_the_server(method: Any) -> None:
    for field in fields_below(method.output_type):
        assert not set(field.name.split("_")) & (CLAIMS - {"account"}), field.full_name


def test_what_a_model_or_a_cell_wrote_travels_as_bytes() -> None:
    texts = {
        field.name
        for method in METHODS
        for message in (method.input_type, method.output_type)
        for field in fields_below(message)
        if field.type == field.TYPE_BYTES
    }
    assert {"question", "answer", "text", "data", "event_json"} <= texts
    assert not re.findall(r"answer|question|event", " ".join(_strings()))


def _strings() -> set[str]:
    return {
        field.name
        for method in METHODS
        for message in (method.input_type, method.output_type)
        for field in fields_below(message)
        if field.type == field.TYPE_STRING
    }

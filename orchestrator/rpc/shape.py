"""A look at a message's bytes before a parser gets them.

A protobuf parser takes whatever is well-formed, in one piece that nothing can interrupt: eight megabytes of
two-byte fields take it 130 ms, during which this process serves nobody. Honest messages are a handful of
fields, and the long ones of those are bytes, which cost nothing. Only the top level is looked at, so this is
as cheap as its fields are few.
"""

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from orchestrator.errors import GuestProtocolError
from orchestrator.limits import MAX_FIELDS_IN_MESSAGE, MAX_NESTED_MESSAGE_BYTES

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def check_shape(data: bytes, message: Descriptor) -> None:
    """Refuse what no honest sender of such a message writes.

    Source: the protobuf encoding, https://protobuf.dev/programming-guides/encoding/.

    Raises:
        GuestProtocolError: It is cut off, has groups, too many fields, or too long a message in it.
    """
    at, fields = 0, 0
    while at < len(data):
        fields += 1
        if fields > MAX_FIELDS_IN_MESSAGE:
            raise GuestProtocolError("a message has too many fields")
        key, at = _varint(data, at)
        match key & 7:
            case kind if kind == _VARINT:
                _, at = _varint(data, at)
            case kind if kind == _FIXED64:
                at += 8
            case kind if kind == _FIXED32:
                at += 4
            case kind if kind == _LENGTH_DELIMITED:
                length, at = _varint(data, at)
                at += length
                if length > MAX_NESTED_MESSAGE_BYTES and _is_message(message, key >> 3):
                    raise GuestProtocolError("a part of a message is too long")
            case _:
                raise GuestProtocolError("a message has a group in it")
    if at != len(data):
        raise GuestProtocolError("a message is cut off")


def _is_message(message: Descriptor, number: int) -> bool:
    field = message.fields_by_number.get(number)
    return field is not None and field.type == FieldDescriptor.TYPE_MESSAGE


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise GuestProtocolError("a message has a number that does not end")

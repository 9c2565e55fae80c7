"""A guest that speaks HTTP/2 by hand, to say what no library would.

Standard library only, so that the same source runs beside a test (`python -m tests.wire.raw_guest SOCKET
ATTACK '{"argument": 1}'`) and as a cell in a real container. Every attack is bounded in number and time and
stops at the first sign that nobody listens any more. Only against our own socket.

Sources: frames and error codes RFC 9113, header blocks RFC 7541 (literals without indexing), the five bytes
before each message https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

import array
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
COMPLETE = b"/rlm_proto.v1.BrokerService/Complete"
UPLOAD = b"/rlm_proto.v1.BrokerService/UploadContext"
CHILD = b"/rlm_proto.v1.BrokerService/StartChildRun"
BUDGET = b"/rlm_proto.v1.BrokerService/GetBudget"


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def number(value: int, prefix_bits: int) -> bytes:
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes((value,))
    out = bytearray((most,))
    value -= most
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def header(name: bytes, value: bytes) -> bytes:
    return b"\0" + number(len(name), 7) + name + number(len(value), 7) + value


def request(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"guest")]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), *more]
    return b"".join(header(name, value) for name, value in fields)


def message(data: bytes, length: int | None = None, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(data) if length is None else length) + data


def complete(call_id: bytes, prompt: bytes) -> bytes:
    """A serialised CompleteRequest."""
    return b"\n" + number_of(len(call_id)) + call_id + b"\x12" + number_of(len(prompt)) + prompt


def number_of(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


class Gone(Exception):  # noqa: N818 - an event more than an error
    """The host hung up."""


Seen = dict[str, object]
"""What an attack saw. A guest's word: the test looks at the host."""


class Wire:
    """One connection, greeted. A polite one acknowledges what the host sends, so that the host never waits.

    `seen` counts what came back by frame type, `ended` the streams that are over.
    """

    def __init__(self, path: str, *, greet: bool = True, polite: bool = True) -> None:
        self.polite = polite
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(path)
        self.seen: dict[int, int] = {}
        self.goaway = b""
        self.ended = 0
        self.rest = b""
        self.stream = -1
        if greet:
            self.send(PREFACE + frame(SETTINGS))

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise Gone(str(error)) from error

    def open(self, path: bytes, *more: tuple[bytes, bytes], end: bool = False) -> int:
        """The next stream's headers; its number."""
        self.stream += 2
        flags = END_HEADERS | (END_STREAM if end else 0)
        self.send(frame(HEADERS, flags, self.stream, request(path, *more)))
        return self.stream

    def data(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Payload in frames of at most 16 kB, as the peer's settings allow; flow control is ignored."""
        parts = [data[at : at + 16384] for at in range(0, len(data), 16384)] or [b""]
        out = b"".join(frame(DATA, 0, stream, part) for part in parts[:-1])
        self.send(out + frame(DATA, END_STREAM if end else 0, stream, parts[-1]))

    def read(self, wait_s: float = 0.0) -> bool:
        """Take what has come; whether the host is still there."""
        while self.socket.fileno() >= 0 and select.select([self.socket], [], [], wait_s)[0]:
            wait_s = 0.0
            try:
                data = self.socket.recv(1 << 20)
            except (OSError, ValueError):
                return False
            if not data:
                return False
            self.rest += data
            self.parse()
        return self.socket.fileno() >= 0

    def parse(self) -> None:
        while len(self.rest) >= 9:
            length = int.from_bytes(self.rest[:3], "big")
            if len(self.rest) < 9 + length:
                return
            kind, flags = self.rest[3], self.rest[4]
            self.seen[kind] = self.seen.get(kind, 0) + 1
            self.ended += kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM)
            if self.polite:
                self.acknowledge(kind, flags, self.rest[9 : 9 + length])
            if kind == GOAWAY:
                self.goaway = self.rest[9 : 9 + length]
            self.rest = self.rest[9 + length :]

    def until_closed(self, most_s: float) -> float | None:
        """How long until the host hung up, or None."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < most_s:
            if not self.read(0.2):
                return time.monotonic() - began_s
        return None

    def acknowledge(self, kind: int, flags: int, payload: bytes) -> None:
        try:
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
            elif kind == DATA and payload:
                self.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
        except Gone:
            return


Act = Callable[[Wire, int], None]


def repeatedly(path: str, act: Act, most: int, most_s: float, *, polite: bool = True) -> Seen:
    """Do `act(wire, number)` on one connection after the other; what was seen."""
    done, connections, refused, began_s = 0, 0, 0, time.monotonic()
    goaways: list[str] = []
    while done < most and time.monotonic() - began_s < most_s and refused < 20:
        try:
            wire = Wire(path, polite=polite)
        except (Gone, OSError):
            refused += 1
            time.sleep(0.05)
            continue
        connections += 1
        before = done
        try:
            while done < most and time.monotonic() - began_s < most_s:
                act(wire, done)
                done += 1
                if not wire.read():
                    break
        except (Gone, OSError):
            pass
        if wire.goaway:
            goaways.append(wire.goaway[8:].decode("latin-1"))
        wire.socket.close()
        refused = refused + 1 if done == before else 0
    took_s = time.monotonic() - began_s
    return {"done": done, "connections": connections, "took_s": took_s, "goaways": goaways[:3]}


def silent(path: str, count: int = 1000, wait_s: float = 8.0) -> Seen:
    """G01: connections that say nothing."""
    sockets: list[socket.socket] = []
    refused = 0
    for _ in range(count):
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        try:
            one.connect(path)
        except OSError:
            refused += 1
        sockets.append(one)
    time.sleep(wait_s)
    closed = 0
    for one in sockets:
        try:
            closed += one.recv(1 << 16) == b""
        except BlockingIOError:
            pass
        except OSError:
            closed += 1
    return {"opened": count - refused, "closed": closed}


def slow_headers(path: str, most_s: float = 45.0) -> Seen:
    """G02: a header frame, one byte at a time."""
    wire = Wire(path)
    began_s = time.monotonic()
    for byte in frame(HEADERS, END_HEADERS, 1, request(COMPLETE) * 50):
        if time.monotonic() - began_s > most_s or not wire.read(0.5):
            break
        try:
            wire.send(bytes((byte,)))
        except Gone:
            break
    return {"closed_after_s": time.monotonic() - began_s, "closed": time.monotonic() - began_s < most_s}


def slow_data(path: str, method: str = "Complete", streams: int = 30, most_s: float = 20.0) -> Seen:
    """G02, G12: many streams, each message one byte at a time, and no end."""
    wire = Wire(path)
    began_s, ended = time.monotonic(), 0
    name = b"/rlm_proto.v1.BrokerService/" + method.encode()
    opened = [wire.open(name) for _ in range(streams)]
    for stream in opened:
        wire.send(frame(DATA, 0, stream, message(b"", 1_000_000)))
    while time.monotonic() - began_s < most_s and ended < streams:
        try:
            for stream in opened:
                wire.send(frame(DATA, 0, stream, b"x"))
        except Gone:
            break
        if not wire.read(0.2):
            break
        ended = wire.ended
    return {"ended": ended, "took_s": time.monotonic() - began_s}


def half_upload(path: str, most_s: float = 20.0) -> Seen:
    """G12: an upload whose parts stop coming."""
    wire = Wire(path)
    stream = wire.open(UPLOAD)
    wire.data(stream, message(b"\x12\x04text"), end=False)
    began_s = time.monotonic()
    while time.monotonic() - began_s < most_s and not wire.seen.get(HEADERS):
        if not wire.read(0.2):
            break
    return {"ended": wire.seen.get(HEADERS, 0), "took_s": time.monotonic() - began_s}


def rapid_reset(path: str, most: int = 50_000, most_s: float = 20.0) -> Seen:
    """G04: streams that are reset as they are opened."""

    def act(wire: Wire, _number: int) -> None:
        stream = wire.open(COMPLETE)
        wire.send(frame(RST_STREAM, 0, stream, b"\0\0\0\x08"))

    return repeatedly(path, act, most, most_s)


def reset_with_request(path: str, most: int = 50_000, most_s: float = 20.0) -> Seen:
    """G04: whole requests, reset as they are sent."""

    def act(wire: Wire, number: int) -> None:
        stream = wire.open(COMPLETE)
        body = message(complete(b"r%d" % number, b"x" * 2000))
        wire.data(stream, body)
        wire.send(frame(RST_STREAM, 0, stream, b"\0\0\0\x08"))

    return repeatedly(path, act, most, most_s)


def reset_by_mistakes(path: str, most: int = 50_000, most_s: float = 20.0) -> Seen:
    """G04: streams that the host has to reset, because their window update is 0 ("MadeYouReset")."""

    def act(wire: Wire, _number: int) -> None:
        stream = wire.open(COMPLETE)
        wire.send(frame(WINDOW_UPDATE, 0, stream, b"\0\0\0\0"))

    return repeatedly(path, act, most, most_s)


def calls(
    path: str,
    method: str = "Complete",
    most: int = 10_000,
    most_s: float = 20.0,
    *,
    prompt_bytes: int = 5,
    window: int = 60,
) -> Seen:
    """G03, G15: calls as fast as they go. The host's cap on streams is ignored."""
    name = b"/rlm_proto.v1.BrokerService/" + method.encode()
    prompt = b"x" * prompt_bytes

    def act(wire: Wire, number: int) -> None:
        body = complete(b"c%d-%d" % (os.getpid(), number), prompt) if method == "Complete" else b""
        wire.data(wire.open(name), message(body))
        while wire.stream // 2 - wire.ended > window:
            if not wire.read(1.0):
                raise Gone

    return repeatedly(path, act, most, most_s)


def unknown_methods(path: str, most: int = 10_000, most_s: float = 20.0) -> Seen:
    """G10: methods that nobody serves."""
    return calls(path, "No", most, most_s)


def malformed(path: str, most: int = 10_000, most_s: float = 20.0) -> Seen:
    """G09: messages that are none."""

    def act(wire: Wire, _number: int) -> None:
        wire.data(wire.open(COMPLETE), message(b"\xff" * 64))

    return repeatedly(path, act, most, most_s)


def oversize(
    path: str, length: int = 2**31 - 1, *, sent: int = 0, flag: int = 0, most_s: float = 5.0
) -> Seen:
    """G05, G06: a message that claims a length, with less or as much behind it."""
    wire = Wire(path)
    stream = wire.open(COMPLETE)
    try:
        wire.data(stream, message(b"", length, flag), end=False)
        for _ in range(sent // 16384):
            wire.send(frame(DATA, 0, stream, b"\0" * 16384))
            if not wire.read():
                break
    except Gone:
        pass
    closed_after_s = wire.until_closed(most_s)
    return {"ended": wire.ended, "closed_after_s": closed_after_s}


def metadata(path: str, kind: str = "long", most_s: float = 5.0) -> Seen:
    """G07: headers that are too long, too many, or junk."""
    kinds: dict[str, list[tuple[bytes, bytes]]] = {
        "long": [(b"x-long", b"y" * 100_000)],
        "many": [(b"x-%d" % place, b"y") for place in range(10_000)],
        "bin": [(b"x-junk-bin", b"\xff\xfe not base64 \x01")],
        "nul": [(b"x-nul", b"a\0b")],
        "utf8": [(b"x-text", "ä\U0001f600".encode())],
        "upper": [(b"X-Upper", b"y")],
        "path": [],
        "pseudo": [(b":path", b"/again")],
    }
    more = kinds[kind]
    wire = Wire(path)
    block = request(b"/\xff\xfe/\xff" if kind == "path" else BUDGET, *more)
    parts = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    try:
        for place, part in enumerate(parts):
            last = END_HEADERS if place == len(parts) - 1 else 0
            first = frame(HEADERS, last, 1, part) if not place else frame(CONTINUATION, last, 1, part)
            wire.send(first)
        wire.send(frame(DATA, END_STREAM, 1, message(b"")))
    except Gone:
        pass
    began_s = time.monotonic()
    while time.monotonic() - began_s < most_s and wire.read(0.1):
        if wire.seen.get(HEADERS) or wire.seen.get(RST_STREAM) or wire.goaway:
            break
    return {"ended": wire.ended, "goaway": bool(wire.goaway)}


def continuations(path: str, most: int = 100_000, most_s: float = 10.0) -> Seen:
    """G07: a header block that never ends."""
    wire = Wire(path)
    wire.send(frame(HEADERS, 0, 1, request(BUDGET)))
    sent, began_s = 0, time.monotonic()
    part = frame(CONTINUATION, 0, 1, header(b"x-more", b"y" * 100))
    try:
        while sent < most and time.monotonic() - began_s < most_s and wire.read():
            wire.send(part)
            sent += 1
    except Gone:
        pass
    return {"sent": sent}


def frames(
    path: str,
    kind: str = "ping",
    most: int = 1_000_000,
    most_s: float = 10.0,
    *,
    polite: bool = True,
) -> Seen:
    """G08: frames that need no call, on one connection after the other."""
    one = {
        "ping": frame(PING, 0, 0, b"12345678"),
        "settings": frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)),
        "window": frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\x01"),
    }[kind]
    many = one * 100
    seen = repeatedly(path, lambda wire, _: wire.send(many), most // 100, most_s, polite=polite)
    return {**seen, "frames_in_each": 100}


def connections(path: str, most: int = 20_000, most_s: float = 10.0) -> Seen:
    """G01: connections that come and go."""
    done, began_s, gone = 0, time.monotonic(), 0
    while done < most and time.monotonic() - began_s < most_s and gone < 20:
        try:
            wire = Wire(path)
            wire.read(0.05)
            wire.socket.close()
            done += 1
        except (Gone, OSError):
            gone += not os.path.exists(path)
    return {"done": done, "took_s": time.monotonic() - began_s}


def slow_reader(path: str, streams: int = 64, most_s: float = 20.0) -> Seen:
    """G13: asks, and never reads the answers."""
    wire = Wire(path)
    for _ in range(streams):
        wire.data(wire.open(COMPLETE), message(complete(b"s", b"hello")))
    time.sleep(most_s)
    return {"asked": streams}


def descriptors(path: str, count: int = 100) -> Seen:
    """G17: descriptors handed over with the preface."""
    wire = Wire(path, greet=False)
    fds = array.array("i", [os.open("/dev/null", os.O_RDONLY) for _ in range(count)])
    sent = 0
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
    try:
        wire.socket.sendmsg([PREFACE + frame(SETTINGS)], ancillary)
        sent = count
        for _ in range(20):
            wire.socket.sendmsg([frame(PING, 0, 0, b"12345678")], ancillary)
            sent += count
    except OSError:
        pass
    time.sleep(0.5)
    return {"sent": sent}


def main() -> None:
    path, name, *more = sys.argv[1:]
    arguments = json.loads(more[0]) if more else {}
    print(json.dumps({"ran": True, **globals()[name](path, **arguments)}))


if __name__ == "__main__":
    main()

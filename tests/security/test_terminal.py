"""What reaches a person's terminal: cases L10 and L11, by the bytes that come out of a pty."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import exits

PAYLOADS = {
    "clipboard (OSC 52)": "\x1b]52;c;aGVsbG8=\x07",
    "link (OSC 8)": "\x1b]8;;http://127.0.0.1/\x1b\\click\x1b]8;;\x1b\\",
    "title (OSC 0)": "\x1b]0;title\x07",
    "an OSC that never ends": "\x1b]2;",
    "where is the cursor (CSI 6n)": "\x1b[6n",
    "what are you (CSI c)": "\x1b[c\x1b[>c",
    "erase and move": "\x1b[2J\x1b[H\x1b[1A\x1b[2K",
    "another screen": "\x1b[?1049h",
    "paste and mouse": "\x1b[?2004h\x1b[?1000h",
    "colours": "\x1b[31;1mred\x1b[0m",
    "DCS": "\x1bP$q\x1b\\",
    "APC, PM, SOS": "\x1b_x\x1b\\\x1b^x\x1b\\\x1bXx\x1b\\",
    "reset": "\x1bc",
    "8-bit CSI, OSC, DCS": "\x9b31m\x9d0;t\x9c\x90x\x9c",
    "bell, backspace, delete": "\x07\x08\x7f",
    "carriage return": "50%\rrlm: answered",
    "vertical tab, form feed": "\x0b\x0c",
    "shift in and out": "\x0e\x0f",
    "NUL": "a\x00b",
    "bidirectional": "user\u202egnp.exe\u2066x\u2069\u200f",
    "zero width": "a\u200bb\ufeffc\u2060d\u00ad",
    "line and paragraph": "a\u2028b\u2029c\x85d",
    "tags": "\U000e0041\U000e0042",
    "a lone half": "\ud800",
    "markup": "[link=http://127.0.0.1/]x[/link][bold]y[/bold][/] :warning: \\[red]",
    "a forged line": "\nrlm: answered after 1 turn",
}
"""Sources: ECMA-48; xterm's control sequences; the bidirectional algorithm's formatting characters."""

# What we draw with: colours, cursor up, erase line, cursor hidden and shown.
_OURS = re.compile(r"\x1b\[(?:[0-9;]*m|[0-9]*A|2K|\?25[lh])")
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_SGR = re.compile(r"\x1b\[([0-9;]*)m")
_STYLES = {"0", "1", "2", "31", "32", "36"}
"""Plain, bold, dim, red, green, cyan."""


def _seen_on_a_terminal(tmp_path: Path, ending: str, *, term: str, payload: str, options: list[str]) -> str:
    path = tmp_path / f"{ending}.txt"
    path.write_bytes(payload.encode("utf-8", "surrogatepass"))
    # What a shell can hand over.
    question = payload.encode("utf-8", "replace").decode().replace("\0", "")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.security.hostile_run", "run", question),
            *("--context", str(path), *options),
        ],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={"PATH": os.environ["PATH"], "TERM": term, "COLUMNS": "200", "LINES": "50"},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        seen = bytearray()
        try:
            while piece := os.read(ours, 65_536):
                seen += piece
        except OSError:
            pass  # how Linux says that the other side is closed
    os.close(ours)
    assert process.returncode == {"answered": 0, "refused": 2}.get(ending, 1)
    return seen.decode()


@pytest.mark.case("L10", "L11", "J10", "Q07")
@pytest.mark.parametrize(
    ("ending", "term", "options"),
    [
        ("answered", "xterm-256color", []),
        ("failed", "xterm-256color", []),
        ("broken", "xterm-256color", []),
        ("answered", "dumb", []),
        ("failed", "dumb", ["--json"]),
        ("refused", "dumb", []),
    ],
)
def test_nothing_hostile_drives_a_terminal(
    tmp_path: Path, ending: str, term: str, options: list[str]
) -> None:
    payload = " ".join(PAYLOADS.values())
    seen = _seen_on_a_terminal(tmp_path, ending, term=term, payload=payload, options=options)

    assert {style for found in _SGR.findall(seen) for style in found.split(";")} <= _STYLES
    # The terminal itself puts a return before each newline, and we draw with returns.
    rest = _OURS.sub("", seen).replace("\r", "")
    assert not _UNSAFE.findall(rest)
    assert "\\x1b]52;c;aGVsbG8=\\x07" in seen, "it was shown, as text"
    if term == "dumb":
        assert "\x1b" not in seen


@pytest.mark.case("L10", "L11")
@pytest.mark.parametrize("payload", PAYLOADS)
def test_each_is_shown_as_text_where_an_answer_goes(payload: str, capsys: pytest.CaptureFixture[str]) -> None:
    exits.put(PAYLOADS[payload])
    exits.tell(PAYLOADS[payload])

    out, err = capsys.readouterr()
    assert not _UNSAFE.findall(out + err)
    assert err.count("\n") == 1


@pytest.mark.case("L11")
def test_markup_is_shown_as_it_stands(tmp_path: Path) -> None:
    seen = _seen_on_a_terminal(
        tmp_path, "failed", term="xterm-256color", payload=PAYLOADS["markup"], options=[]
    )

    assert PAYLOADS["markup"] in seen
    assert "\x1b]8" not in seen

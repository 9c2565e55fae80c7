"""Text that a model, a guest or a file system wrote, made safe to show on one's own terminal.

The result is for reading, not for parsing back: a backslash that was in the text stays as it is.
"""

import re

# Everything that moves a cursor, sets a colour, turns the direction of writing, hides text or breaks a line
# where no line ends. The joiners U+200C and U+200D stay: emoji and Persian need them, and they do no harm.
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 without tab and newline
    "\u00ad\u061c\u180e\u200b\u200e\u200f"  # soft hyphen, direction marks, zero width
    "\u2028-\u202e\u2060-\u206f"  # separators, bidirectional embeddings, overrides and isolates
    "\ufeff\ufff9-\ufffb"  # byte order mark, interlinear annotation
    "\ud800-\udfff"  # lone surrogates: no encoding can write them
    "\U000e0000-\U000e007f"  # tags: whole sentences that nobody sees
    "]"
)
_ELLIPSIS = "…"


def visible(text: str) -> str:
    r"""The text with every unsafe character written as an escape such as `\x1b` or `\u202e`.

    Newlines and tabs stay. The result can always be encoded as UTF-8.
    """
    return _UNSAFE.sub(lambda match: _escape(match[0]), text)


def visible_line(text: str, max_chars: int) -> str:
    """The text as one line of at most `max_chars` characters, cut with an ellipsis.

    Newlines and tabs become escapes too, and no escape is cut in two. Characters are counted, not columns.
    """
    shown: list[str] = []
    length = 0
    # What is shown of a character is never shorter than the character, so the rest cannot matter.
    for char in text[: max_chars + 1]:
        piece = _escape(char) if char in "\n\t" or _UNSAFE.match(char) else char
        shown.append(piece)
        length += len(piece)
    if length <= max_chars:
        return "".join(shown)
    while shown and length > max_chars - len(_ELLIPSIS):
        length -= len(shown.pop())
    return "".join(shown) + _ELLIPSIS if max_chars > 0 else ""


def _escape(char: str) -> str:
    code = ord(char)
    if char in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[char]
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

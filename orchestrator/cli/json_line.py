"""JSON that is safe to show on a terminal and to split at line ends."""

import json


def json_line(value: object) -> str:
    """The value as one line of plain ASCII without a control character.

    Everything above ASCII is escaped by `json`, U+2028 among it. DEL is the one control character that JSON
    allows unescaped; it can stand in strings only, so replacing it keeps the line valid.
    """
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")

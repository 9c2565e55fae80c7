"""Every input that fuzzing began with or stumbled over, and a few blunt changes of each, without a fuzzer."""

import importlib
import random
from pathlib import Path

import pytest

from tests.fuzz import TARGETS

_CORPUS = Path(__file__).parent / "corpus"
_CASES = {
    "guest_stream": ["G09", "G14"],
    "replies": ["J03", "J04"],
    "events": ["J09"],
    "archives": ["B05"],
}
_CHANGES = 10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.case(*_CASES[name])) for name in TARGETS]
)
def test_the_corpus_and_its_neighbours_break_no_promise(name: str) -> None:
    target = importlib.import_module(f"tests.fuzz.{name}")
    corpus = sorted((_CORPUS / name).iterdir())
    assert corpus, "it is made by: python -m tests.fuzz --make-corpus"
    for data in (*target.seeds(), *(path.read_bytes() for path in corpus)):
        target.one_input(data)
        dice = random.Random(data)  # noqa: S311 - the same changes every time
        for _ in range(_CHANGES):
            changed = bytearray(data or b"\0")
            for _ in range(dice.randint(1, 4)):
                changed[dice.randrange(len(changed))] = dice.randrange(256)
            target.one_input(
                bytes(changed[: dice.randint(1, len(changed))] if dice.random() < 0.3 else changed)
            )

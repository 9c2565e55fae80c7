"""The specification names tests; this one holds it to them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECIFICATION = (ROOT / "SPECIFICATION.md").read_text()


def named_tests() -> list[tuple[str, str]]:
    """(file, test) pairs; `::test` alone means the file named before it."""
    pairs, file = [], ""
    for path, test in re.findall(r"`([\w/.]*)(?:::(\w+))?`", SPECIFICATION):
        if path.startswith("tests/"):
            file = path
        if test:
            pairs.append((file, test))
    return pairs


@pytest.mark.parametrize(("file", "test"), named_tests())
def test_every_test_that_is_named_exists(file: str, test: str) -> None:
    assert re.search(rf"^(async def|def|class) {test}\b|^{test} = ", (ROOT / file).read_text(), re.MULTILINE)


def test_every_promise_has_a_test_or_says_that_it_has_none() -> None:
    promises = re.split(r"^\d+\. ", SPECIFICATION, flags=re.MULTILINE)[1:]
    assert len(promises) > 25
    for promise in promises:
        assert "`tests/" in promise or "[test pending]" in promise, promise


def test_every_file_that_is_named_exists() -> None:
    for path in re.findall(r"`(tests/[\w/.]+)", SPECIFICATION):
        assert (ROOT / path).is_file(), path

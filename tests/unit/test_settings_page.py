"""docs/settings.md names every setting, and its defaults are those of the code."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import read_settings
from orchestrator.errors import InvalidRequestError

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HOME = {"HOME": "/home/somebody"}
CLIENTS_OWN = {"RLM_API_KEY"}
"""On the page, in another section: it is no setting of the process."""


def _rows() -> Iterator[tuple[list[str], list[str]]]:
    """Each row's settings, and its other cells."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`(RLM_[A-Z0-9_]+)`", cells[0])
        if names:
            yield names, cells[1:]


def _known() -> set[str]:
    with pytest.raises(InvalidRequestError) as refused:
        read_settings({"RLM_NO_SUCH_SETTING": "1"})
    return set(re.findall(r"RLM_[A-Z0-9_]+", str(refused.value).partition("known are")[2]))


def _defaults() -> dict[str, str]:
    """What the page says in so many characters, and not in words."""
    # The last cell is prose; an option, before the default, begins with two hyphens.
    found = (
        (name, re.fullmatch(r"`((?!--)[^`]+)`", cell))
        for names, cells in _rows()
        for name in names
        for cell in cells[:-1]
    )
    return {name: default.group(1) for name, default in found if default}


def test_every_setting_is_on_the_page_once_and_no_other() -> None:
    named = [name for names, _ in _rows() for name in names]
    assert sorted(named) == sorted(_known() - CLIENTS_OWN)
    assert all(name in PAGE.read_text(encoding="utf-8") for name in CLIENTS_OWN)


def test_giving_every_setting_its_default_changes_nothing() -> None:
    """All at once: a sub-model is the model's where only that one is given."""
    assert read_settings({**HOME, **_defaults()}) == read_settings(HOME)

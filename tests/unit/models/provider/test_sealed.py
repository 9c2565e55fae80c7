import os

import pytest

from orchestrator.errors import InvalidRequestError, KeyMissingError
from orchestrator.models.provider.sealed import VARIABLE, SealedCredentials, unseal
from tests.open_files import nothing_left_open

GIVEN = {"ANTHROPIC_API_KEY": "sk-\udcff\n", "AWS_SESSION_TOKEN": "x" * 4_000}


def test_what_was_sealed_comes_out_once() -> None:
    sealed = SealedCredentials.of(GIVEN)
    fd = sealed.take()
    again = os.dup(fd)
    assert unseal(fd) == GIVEN
    with pytest.raises(KeyMissingError, match="handed over already"):
        unseal(again)
    with pytest.raises(KeyMissingError, match="handed over already"):
        sealed.take()
    sealed.close()


def test_none_are_something_else_than_ones_that_are_gone() -> None:
    assert unseal(SealedCredentials.of({}).take()) == {}


def test_other_programs_do_not_inherit_them() -> None:
    sealed = SealedCredentials.of(GIVEN)
    fd = sealed.take()
    assert not os.get_inheritable(fd)
    os.set_inheritable(fd, True)
    handed_over = SealedCredentials.handed_over({VARIABLE: str(fd)})
    assert not os.get_inheritable(fd)
    assert unseal(handed_over.take()) == GIVEN


def test_without_a_word_there_are_none() -> None:
    assert unseal(SealedCredentials.handed_over({}).take()) == {}


@pytest.mark.parametrize("told", ["", "x", "-1", "99999", "9" * 40, "0x1", "3.0"])
def test_a_variable_that_names_no_pipe_is_refused(told: str) -> None:
    with pytest.raises(InvalidRequestError, match=VARIABLE):
        SealedCredentials.handed_over({VARIABLE: told})


def test_a_file_is_no_pipe() -> None:
    with open(os.devnull, "rb") as file, pytest.raises(InvalidRequestError, match="names no pipe"):
        SealedCredentials.handed_over({VARIABLE: str(file.fileno())})


def test_what_is_longer_than_a_pipe_is_refused_and_not_waited_for() -> None:
    with nothing_left_open(), pytest.raises(KeyMissingError, match="longer than any credentials"):
        SealedCredentials.of({"ANTHROPIC_API_KEY": "x" * 1_000_000})

"""Files that `rlm image` writes and reads."""

from pathlib import Path

import pytest

from orchestrator.cli import image as command
from orchestrator.errors import InvalidRequestError


def write(
    target: Path,
    content: bytes,
    *,
    force: bool = False,
    then: BaseException | None = None,
    meanwhile: bytes = b"",
) -> None:
    with command._new_file(target, force=force) as sink:
        sink.write(content)
        if meanwhile:
            target.write_bytes(meanwhile)
        if then:
            raise then


def test_a_file_is_there_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "image.tar.gz"
    with command._new_file(target, force=False) as sink:
        sink.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_file_that_could_not_be_finished_leaves_what_was_there(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "image.tar.gz"
    target.write_bytes(b"before")
    with pytest.raises(type(error)):
        write(target, b"half", force=True, then=error)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "image.tar.gz"
    # A link to nowhere is somebody's too.
    target.symlink_to(tmp_path / "gone")
    with pytest.raises(InvalidRequestError, match="--force"), command._new_file(target, force=False):
        pytest.fail("it was opened")
    with command._new_file(target, force=True) as sink:
        sink.write(b"new")
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_name_that_appears_meanwhile_is_not_replaced_either(tmp_path: Path) -> None:
    target = tmp_path / "image.tar.gz"
    with pytest.raises(InvalidRequestError, match="somebody else"):
        write(target, b"ours", meanwhile=b"theirs")
    assert target.read_bytes() == b"theirs"


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="directory"), command._new_file(tmp_path, force=True):
        pytest.fail("it was opened")


def test_a_file_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidRequestError, match="cannot be read: No such file"),
        command._readable(str(tmp_path / "none")),
    ):
        pytest.fail("it was opened")


@pytest.mark.parametrize("expected_id", ["latest", "sha256:12", "sha256:" + "G" * 64, "sha256:" + "a" * 65])
def test_an_id_that_is_none_is_refused_before_anything_is_read(expected_id: str) -> None:
    with pytest.raises(InvalidRequestError, match="64 hexadecimal"):
        command.load("no such file", expected_id=expected_id)

"""Files on both sides of the wall, in real sandboxes: cases B04, B06, B07."""

import os
import time
from pathlib import Path

import pytest

from tests.e2e.playing import Player
from tests.unit.contexts.archives import tar_of

CANARY = "the canary outside the tree"

_FARM = """\
import os
here = "/tmp"
for name in (b"new\\nline", b"\\x1b[2J", b"caf\\xe9", b"n" * 255, b"-rf", b"..."):
    os.close(os.open(os.path.join(b"/tmp", name), os.O_CREAT | os.O_WRONLY))
for number in range(500):
    os.symlink({target!r}, f"/tmp/link{{number}}")
try:
    os.mkfifo("/tmp/pipe")
except PermissionError:
    pass  # the seccomp profile has no mknod
with open("/tmp/sparse", "wb") as file:
    file.truncate(40 << 20)
depth = 0
fd = os.open("/tmp", os.O_RDONLY)
try:
    while depth < 10_000:
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
        depth += 1
except OSError as error:
    print("stopped by", error.errno)
os.close(fd)
print("depth", depth, "entries", len(os.listdir("/tmp")))
FINAL("done")
"""


@pytest.mark.case("B06", "B07")
async def test_what_a_cell_leaves_behind_is_removed_soon_and_nothing_is_followed(
    player: Player, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text(CANARY)
    opened: list[str] = []
    real_open = os.open

    def watched_open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        opened.append(os.fsdecode(path))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", watched_open)
    script = player.script([_FARM.format(target=str(outside))])
    started_s = time.monotonic()

    played = await player.run(script)

    assert played.report.answer == "done", [cell.traceback for cell in played.cells]
    (cell,) = played.cells
    depth = int(str(cell.output).split("depth ")[1].split()[0])
    assert depth > 1_000, "a deep tree was made"
    # Generous: the farm takes the most of it. The fixture finds containers and directories that are left.
    assert time.monotonic() - started_s < 60
    assert (outside / "canary").read_text() == CANARY
    assert sorted(os.listdir(outside)) == ["canary"]
    named = {"pipe", "sparse", "link0", "canary", "d"}
    assert not [path for path in opened if os.path.basename(path) in named], "no path of a guest is opened"


@pytest.mark.case("B04")
async def test_a_guest_sees_no_link_of_the_tree_it_was_given(player: Player, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "canary").write_text(CANARY)
    (tree / "file").write_text("text")
    (tree / "link").symlink_to(tmp_path / "canary")
    (tree / "up").symlink_to("../canary")
    os.mkfifo(tree / "pipe")
    cell = (
        "import os, stat\n"
        "kinds = {stat.S_IFMT(os.lstat(os.path.join(top, name)).st_mode)\n"
        "         for top, _, names in os.walk('/context') for name in names}\n"
        "blob = open('/context/blob', 'rb').read()\n"
        "FINAL(repr((sorted(context), kinds == {stat.S_IFREG}, blob)))"
    )

    played = await player.run(player.script([cell]), tree)

    assert played.report.answer == repr((["file"], True, b"text"))
    assert len(played.report.notes) == 3


@pytest.mark.case("B05")
async def test_an_archive_is_a_mapping_in_the_guest(player: Player, tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "data.tar.gz", {"b.txt": b"bee", "a/c": "größer".encode()}, compression="gz")

    played = await player.run(player.script(["FINAL(repr(dict(context)))"]), archive)

    assert played.report.answer == repr({"a/c": "größer", "b.txt": "bee"})

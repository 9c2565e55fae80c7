import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import (
    BudgetExceededError,
    ConflictError,
    ContextInputError,
    HashMismatchError,
    InvalidRequestError,
    StoreError,
)
from orchestrator.ids import TenantId
from orchestrator.service.books import Books
from orchestrator.service.context_desk import MAX_PART_BYTES, ContextDesk
from orchestrator.service.port import Upload
from orchestrator.store.books import ContextRow, TenantRules

pytestmark = pytest.mark.asyncio

TEXT = b"The quick brown fox.\n" * 1_000
ROOMY = 1 << 40


@pytest.fixture
async def tenant(books: Books) -> TenantId:
    return (await books.tenants.add_tenant("acme", TenantRules())).tenant_id


@pytest.fixture
def desk(books: Books, tmp_path: Path) -> ContextDesk:
    return ContextDesk(tmp_path / "contexts", books.contexts, home="here")


async def begin(
    desk: ContextDesk, tenant: TenantId, data: bytes = TEXT, name: str = "fox.txt", max_bytes: int = ROOMY
) -> Upload:
    return await desk.start(
        tenant,
        sha256=hashlib.sha256(data).hexdigest(),
        length_bytes=len(data),
        name=name,
        max_bytes=max_bytes,
    )


async def send(desk: ContextDesk, row: ContextRow, data: bytes, offset: int, part: int = 5_000) -> Upload:
    upload = Upload(context=row, next_offset=offset)
    while upload.next_offset < len(data):
        at = upload.next_offset
        upload = await desk.write(row, at, data[at : at + part])
    return upload


def files(tmp_path: Path) -> Sequence[Path]:
    return sorted(path for path in (tmp_path / "contexts").rglob("*") if path.is_file())


async def test_what_was_uploaded_in_parts_is_there_whole(desk: ContextDesk, tenant: TenantId) -> None:
    begun = await begin(desk, tenant)
    assert (begun.next_offset, begun.context.is_complete) == (0, False)
    done = await send(desk, begun.context, TEXT, 0)
    assert done.context.is_complete
    assert desk.path(done.context).read_bytes() == TEXT


async def test_an_upload_is_taken_up_where_it_stands_also_by_the_next_server(
    desk: ContextDesk, books: Books, tenant: TenantId, tmp_path: Path
) -> None:
    begun = await begin(desk, tenant)
    await desk.write(begun.context, 0, TEXT[:7_777])
    again = await begin(desk, tenant)
    assert (again.context.context_id, again.next_offset) == (begun.context.context_id, 7_777)
    restarted = ContextDesk(tmp_path / "contexts", books.contexts, home="here")
    await restarted.sweep()
    after = await begin(restarted, tenant)
    assert (after.context.context_id, after.next_offset) == (begun.context.context_id, 7_777)
    assert (await send(restarted, after.context, TEXT, 7_777)).context.is_complete


async def test_what_is_there_already_is_not_uploaded_again(desk: ContextDesk, tenant: TenantId) -> None:
    done = await send(desk, (await begin(desk, tenant)).context, TEXT, 0)
    again = await begin(desk, tenant)
    assert again.context == done.context
    assert again.next_offset == len(TEXT)
    with pytest.raises(ConflictError, match="complete"):
        await desk.write(again.context, len(TEXT), b"more")


async def test_bytes_that_do_not_begin_where_it_stands_are_refused_and_change_nothing(
    desk: ContextDesk, tenant: TenantId
) -> None:
    row = (await begin(desk, tenant)).context
    await desk.write(row, 0, TEXT[:100])
    for offset in (0, 99, 101, 10**12):
        with pytest.raises(ContextInputError, match="stands at byte 100"):
            await desk.write(row, offset, b"x")
    with pytest.raises(ContextInputError, match="longer"):
        await desk.write(row, 100, TEXT)
    assert (await send(desk, row, TEXT, 100)).context.is_complete


async def test_another_content_than_was_said_is_dropped(
    desk: ContextDesk, books: Books, tenant: TenantId, tmp_path: Path
) -> None:
    row = (await begin(desk, tenant)).context
    with pytest.raises(HashMismatchError):
        await send(desk, row, TEXT[:-1] + b"?", 0)
    assert await books.contexts.context(tenant, row.context_id) is None
    assert not files(tmp_path)
    assert (await send(desk, (await begin(desk, tenant)).context, TEXT, 0)).context.is_complete


async def test_two_streams_into_one_upload_cannot_mix(desk: ContextDesk, tenant: TenantId) -> None:
    row = (await begin(desk, tenant)).context
    results = await asyncio.gather(
        *(desk.write(row, 0, TEXT[:5_000]) for _ in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, Upload) for result in results) == 1
    assert sum(isinstance(result, ContextInputError) for result in results) == 4
    assert (await send(desk, row, TEXT, 5_000)).context.is_complete


async def test_a_writer_that_hangs_up_leaves_a_part_whole_or_out(desk: ContextDesk, tenant: TenantId) -> None:
    row = (await begin(desk, tenant)).context
    writing = asyncio.create_task(desk.write(row, 0, TEXT[:5_000]))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait((writing,))
    stands = (await begin(desk, tenant)).next_offset
    assert stands in {0, 5_000}
    assert (await send(desk, row, TEXT, stands)).context.is_complete


async def test_a_tenant_keeps_no_more_than_it_may(desk: ContextDesk, tenant: TenantId) -> None:
    await begin(desk, tenant, b"x" * 600, "one", max_bytes=1_000)
    with pytest.raises(BudgetExceededError):
        await begin(desk, tenant, b"y" * 600, "two", max_bytes=1_000)


@pytest.mark.parametrize(
    ("sha256", "length", "name"),
    [
        ("", 1, "n"),
        ("A" * 64, 1, "n"),
        ("../../../etc/passwd", 1, "n"),
        ("0" * 64, 0, "n"),
        ("0" * 64, -1, "n"),
        ("0" * 64, 1, ""),
        ("0" * 64, 1, "x" * 256),
        ("0" * 64, 1, "a\0b"),
        ("0" * 64, 1, "\ud800"),
    ],
)
async def test_an_upload_that_is_none_is_refused(
    desk: ContextDesk, tenant: TenantId, sha256: str, length: int, name: str
) -> None:
    with pytest.raises(InvalidRequestError):
        await desk.start(tenant, sha256=sha256, length_bytes=length, name=name, max_bytes=ROOMY)


async def test_a_part_has_a_limit(desk: ContextDesk, tenant: TenantId) -> None:
    row = (await begin(desk, tenant, b"x" * (2 * MAX_PART_BYTES))).context
    with pytest.raises(InvalidRequestError, match="part"):
        await desk.write(row, 0, b"x" * (MAX_PART_BYTES + 1))


@pytest.mark.parametrize("name", ["../../../../tmp/evil", "/etc/passwd", "a/b/../../c", "c.tar.gz", "-rf"])
async def test_no_name_of_a_users_is_part_of_a_path(
    desk: ContextDesk, tenant: TenantId, tmp_path: Path, name: str
) -> None:
    done = await send(desk, (await begin(desk, tenant, name=name)).context, TEXT, 0)
    (file,) = files(tmp_path)
    assert file == desk.path(done.context)
    assert file.parent.parent == tmp_path / "contexts"
    assert file.name.removesuffix(".tar.gz") == done.context.context_id


async def test_tenants_share_no_directory_and_no_upload(
    desk: ContextDesk, books: Books, tenant: TenantId
) -> None:
    other = (await books.tenants.add_tenant("other", TenantRules())).tenant_id
    ours = await send(desk, (await begin(desk, tenant)).context, TEXT, 0)
    theirs = await begin(desk, other)
    assert theirs.next_offset == 0
    assert desk.path(ours.context).parent != desk.path(theirs.context).parent


async def test_a_link_in_the_place_of_a_file_is_not_followed(
    desk: ContextDesk, tenant: TenantId, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    row = (await begin(desk, tenant)).context
    desk.path(row).unlink()
    desk.path(row).symlink_to(victim)
    with pytest.raises(StoreError):
        await desk.write(row, 0, TEXT[:100])
    assert victim.read_bytes() == b"mine"


async def test_a_disk_that_takes_no_more_costs_no_bytes_that_were_told_of(
    desk: ContextDesk, tenant: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = (await begin(desk, tenant)).context
    await desk.write(row, 0, TEXT[:100])
    full = True
    write = os.pwrite

    def half_written(fd: int, data: bytes, offset: int) -> int:
        if full:
            write(fd, data[: len(data) // 2], offset)
            raise OSError(28, "No space left on device")
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", half_written)
    with pytest.raises(StoreError, match="No space left"):
        await desk.write(row, 100, TEXT[100:5_000])
    assert desk.path(row).stat().st_size == 100
    full = False
    assert (await send(desk, row, TEXT, 100)).context.is_complete


async def test_files_that_no_row_knows_are_removed_at_the_start(
    desk: ContextDesk, tenant: TenantId, tmp_path: Path
) -> None:
    kept = await send(desk, (await begin(desk, tenant)).context, TEXT, 0)
    (desk.path(kept.context).parent / "cstray").write_bytes(b"old")
    (tmp_path / "contexts" / "gone").mkdir()
    (tmp_path / "contexts" / "gone" / "cold").write_bytes(b"old")
    assert await desk.sweep() == 2
    assert list(files(tmp_path)) == [desk.path(kept.context)]


async def test_what_is_removed_is_gone(desk: ContextDesk, tenant: TenantId, tmp_path: Path) -> None:
    done = await send(desk, (await begin(desk, tenant)).context, TEXT, 0)
    with desk.needed(done.context.context_id), pytest.raises(ConflictError):
        await desk.remove(done.context)
    assert await desk.remove(done.context)
    assert not await desk.remove(done.context)
    assert not files(tmp_path)


async def test_a_text_that_came_with_a_question_is_kept_once(desk: ContextDesk, tenant: TenantId) -> None:
    text = os.urandom(3 * MAX_PART_BYTES + 5)
    rows = await asyncio.gather(*(desk.keep_text(tenant, text, max_bytes=ROOMY) for _ in range(4)))
    assert len({row.context_id for row in rows}) == 1
    assert all(row.is_complete and row.is_inline for row in rows)
    assert desk.path(rows[0]).read_bytes() == text


async def test_an_upload_of_another_servers_is_not_written_here(desk: ContextDesk, tenant: TenantId) -> None:
    row = (await begin(desk, tenant)).context
    with pytest.raises(ConflictError, match="another server"):
        await desk.write(replace(row, home="there"), 0, TEXT[:10])

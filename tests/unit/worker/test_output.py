"""The head and the tail of a cell's output."""

from hypothesis import given
from hypothesis import strategies as st

from sandbox_image.worker.output import CHUNK_BYTES, Chunk, OutputCapture


@given(
    writes=st.lists(st.binary(max_size=200)),
    head=st.integers(0, 300),
    tail=st.integers(0, 300),
    take_after=st.sets(st.integers(0, 20)),
)
def test_the_first_and_the_last_bytes_arrive_with_their_offsets(
    writes: list[bytes], head: int, tail: int, take_after: set[int]
) -> None:
    whole = b"".join(writes)
    capture = OutputCapture(head, tail)
    chunks: list[Chunk] = []
    for number, data in enumerate(writes):
        capture.write(data)
        if number in take_after:
            chunks += capture.take_head()
    chunks += capture.take_all()
    assert capture.total_bytes == len(whole)
    for chunk in chunks:
        assert whole[chunk.offset : chunk.offset + len(chunk.data)] == chunk.data
    kept = b"".join(chunk.data for chunk in chunks)
    beyond = whole[head:]
    assert kept == whole[:head] + (beyond[-tail:] if tail else b"")


def test_a_flood_does_not_grow_memory() -> None:
    capture = OutputCapture(1000, 1000)
    for _ in range(1000):
        capture.write(b"x" * 1000)
        assert len(capture._tail) <= 3000
    assert capture.unsent_bytes == 1000


def test_chunks_fit_the_wire() -> None:
    capture = OutputCapture(10 * CHUNK_BYTES, 0)
    capture.write(b"x" * (3 * CHUNK_BYTES + 1))
    assert [len(chunk.data) for chunk in capture.take_all()] == [CHUNK_BYTES] * 3 + [1]

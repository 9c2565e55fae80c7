"""Trees deeper than any path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def chain_of_directories(top: Path, levels: int) -> Iterator[None]:
    """`levels` directories called `d` inside each other, with a file at the bottom. Removes them again."""
    here = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    try:
        yield
    finally:
        os.unlink("bottom", dir_fd=here)
        for _ in range(levels):
            above = os.open("..", os.O_RDONLY, dir_fd=here)
            os.rmdir("d", dir_fd=above)
            os.close(here)
            here = above
        os.close(here)

"""A program with a pool of waiting sandboxes. Killed by a test.

    python -m tests.security.full_pool STATE_DIR IMAGE RUNTIME SIZE

Says "ready" once they all wait and one more is lent; then it goes on for ever.
"""

import asyncio
import sys
from pathlib import Path

import docker

from orchestrator.config import PoolSettings, Settings
from orchestrator.sandbox.pool_events import Phase
from tests.security.house import open_house, until


async def main(state_dir: str, image: str, runtime: str, size: int) -> None:
    """See the module."""
    settings = Settings(
        state_dir=Path(state_dir),
        image=image,
        max_sandboxes=size + 1,
        pool=PoolSettings(runc=size, runsc=size),
    )
    async with open_house(settings, docker.from_env(), runtime) as house, house.sandbox():
        await until(lambda: house.machine.pool.count(Phase.WAITING) == size)
        print("ready", flush=True)
        await asyncio.sleep(3_600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))

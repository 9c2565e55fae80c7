"""A program with many run trees at once, each in the middle of a cell. Killed by a test.

    python -m tests.security.many_runs STATE_DIR IMAGE RUNTIME RUNS

Says "ready" once every run, and every child that half of them have, is in a cell; then it goes on for ever.
"""

import asyncio
import sys
from pathlib import Path

import docker

from orchestrator.config import SandboxSettings, Settings
from orchestrator.limits import RunLimits
from orchestrator.trajectory import CellStarted
from tests.security.house import Script, Story, open_house

_SLEEPS = "import time\nopen('/tmp/mine', 'w').write('x' * 100_000)\ntime.sleep(3600)"
_HAS_A_CHILD = "rlm_query('And you?', 'a context')"


async def main(state_dir: str, image: str, runtime: str, runs: int) -> None:
    """See the module."""
    settings = Settings(
        state_dir=Path(state_dir),
        image=image,
        max_sandboxes=2 * runs,
        sandbox=SandboxSettings(memory_mib=256, tmp_mib=16),
    )
    stories = [Story() for _ in range(runs)]
    async with open_house(settings, docker.from_env(), runtime) as house:
        running = [
            asyncio.create_task(
                house.run(
                    Script([_HAS_A_CHILD if number % 2 else _SLEEPS], child_steps=[_SLEEPS]),
                    limits=RunLimits(max_depth=1),
                    story=story,
                )
            )
            for number, story in enumerate(stories)
        ]
        while _cells(stories) < runs + runs // 2:
            ended = [task for task in running if task.done()]
            assert not ended, ended
            await asyncio.sleep(0.05)
        print("ready", flush=True)
        await asyncio.wait(running)


def _cells(stories: list[Story]) -> int:
    return sum(isinstance(event.payload, CellStarted) for story in stories for event in story.events)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))

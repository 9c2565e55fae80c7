"""An interpreter starts with every sandbox, and a cell waits for it: what it imports is time and memory."""

import inspect
import subprocess
import sys

from sandbox_image.worker.interpreter.cell import CO_COROUTINE


def test_the_interpreter_imports_nothing_heavy() -> None:
    program = (
        "import sys, sandbox_image.worker.interpreter.__main__\n"
        "heavy = {'asyncio', 'dataclasses', 'difflib', 'inspect', 'pathlib', 'sysconfig', 'urllib'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    # Without site: an editable installation's hooks import some of these.
    found = subprocess.run(
        [sys.executable, "-S", "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert found.split() == []


def test_a_coroutine_is_known_by_the_flag_that_inspect_has() -> None:
    assert CO_COROUTINE == inspect.CO_COROUTINE

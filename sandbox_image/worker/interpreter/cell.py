"""Compiles a cell and runs it."""

import __future__

import ast
import functools
import linecache
import operator
from collections.abc import Callable, Coroutine, Sequence
from types import CodeType
from typing import Any, NamedTuple

from sandbox_image.worker import protocol
from sandbox_image.worker.interpreter.final import RunEnded
from sandbox_image.worker.interpreter.interrupts import Interrupts
from sandbox_image.worker.interpreter.tracebacks import current_error, format_error
from sandbox_image.worker.interpreter.used_up import used_up

_FUTURE_FLAGS: int = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)

CO_COROUTINE = 0x80
"""As `inspect` has it, which takes longer to import than everything else in here."""

_EXIT_NOTE = b"\nA cell cannot end the run this way; the namespace is kept. Use FINAL to end the run."


class CellResult(NamedTuple):
    """How a cell ended."""

    outcome: str
    """One of the outcomes of `protocol`."""
    traceback: bytes = b""
    exit_code: int = 0
    """What a forked child that ran into the cell's end should exit with."""
    used_up: Sequence[str] = ()
    """Limits it ran into, by their names in `protocol`."""


class Compiler:
    """Turns the source of cells into code, in the way of Jupyter.

    The value of a last expression is displayed, unless a semicolon ends it. `await` may stand anywhere.
    """

    def __init__(self) -> None:
        # `from __future__ import annotations` holds for later cells too.
        self._future_flags = 0

    def compile(self, source: str, filename: str) -> list[CodeType]:
        """One or two pieces of code, to be run one after the other.

        Raises:
            SyntaxError, ValueError, RecursionError, MemoryError: As the built-in `compile` does.
        """
        # With no time of change, linecache never drops it: tracebacks and inspect.getsource find it.
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        module = ast.parse(source, filename)
        last: list[ast.stmt] = []
        if module.body and isinstance(module.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
            last = [module.body.pop()]
        pieces = [self._compile_tree(module, filename, "exec")] if module.body else []
        if last:
            pieces.append(self._compile_tree(ast.Interactive(last), filename, "single"))
        return pieces

    def _compile_tree(self, tree: ast.Module | ast.Interactive, filename: str, mode: str) -> CodeType:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | self._future_flags
        code: CodeType = compile(tree, filename, mode, flags, dont_inherit=True)
        self._future_flags |= code.co_flags & _FUTURE_FLAGS
        return code


class CellRunner:
    """Runs cells in one namespace."""

    def __init__(self, namespace: dict[str, Any], interrupts: Interrupts) -> None:
        self._namespace = namespace
        self._interrupts = interrupts
        self._compiler = Compiler()
        self._run_coroutine: Callable[[Coroutine[Any, Any, object]], None] = self._run_first_coroutine
        self._stops: tuple[type[BaseException], ...] = (KeyboardInterrupt,)

    def run(self, cell_id: int, source: bytes, when_done: Callable[[], None]) -> CellResult:
        """Run a cell to its end, whatever that is. Raises nothing.

        Args:
            cell_id: Names the cell in tracebacks.
            source: UTF-8.
            when_done: Called after the code, also when it failed; what it raises counts as raised by the
            cell.
        """
        try:
            try:
                self._interrupts.arm()
                return self._execute(f"<cell {cell_id}>", source, when_done)
            finally:
                self._interrupts.disarm()
        except KeyboardInterrupt:
            # It fell between the two lines of `finally`, or into showing another exception.
            self._interrupts.disarm()
            return CellResult(protocol.OUTCOME_INTERRUPTED, b"KeyboardInterrupt", exit_code=1)

    def _execute(self, filename: str, source: bytes, when_done: Callable[[], None]) -> CellResult:
        try:
            try:
                for code in self._compiler.compile(source.decode(), filename):
                    self._run_code(code)
            finally:
                when_done()
        except RunEnded:
            return CellResult(protocol.OUTCOME_OK)
        except BaseException:
            return self._failed()
        return CellResult(protocol.OUTCOME_OK)

    def _failed(self) -> CellResult:
        error, trace = current_error()
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            shown = format_error(error, trace) + _EXIT_NOTE
            return CellResult(protocol.OUTCOME_ERROR, shown, exit_code=code)
        stopped = isinstance(error, self._stops) and self._interrupts.fired
        outcome = protocol.OUTCOME_INTERRUPTED if stopped else protocol.OUTCOME_ERROR
        # First: showing the exception runs code of the cell, which may tidy up.
        limits = used_up(error)
        return CellResult(outcome, format_error(error, trace), exit_code=1, used_up=limits)

    def _run_code(self, code: CodeType) -> None:
        result = eval(code, self._namespace)  # noqa: S307 - running the cell is what this process is for
        if code.co_flags & CO_COROUTINE:
            self._run_coroutine(result)

    def _run_first_coroutine(self, coroutine: Coroutine[Any, Any, object]) -> None:
        # Held back: an interrupt would leave the import half done.
        with self._interrupts:
            from sandbox_image.worker.interpreter import coroutines  # noqa: PLC0415 - see there

            self._run_coroutine = coroutines.CoroutineRunner(self._interrupts).run
            self._stops += (coroutines.Cancelled,)
        self._run_coroutine(coroutine)

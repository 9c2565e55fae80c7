"""The interpreter's life: ready, leased, then one cell after the other until the worker is gone."""

import builtins
import gc
import os
import socket
import threading
from typing import Any

from sandbox_image.worker import protocol
from sandbox_image.worker.frames import Frame, FrameDecoder, encode
from sandbox_image.worker.interpreter import names
from sandbox_image.worker.interpreter.cell import CellResult, CellRunner
from sandbox_image.worker.interpreter.final import FinalAnswer, report_thread_error
from sandbox_image.worker.interpreter.interrupts import Interrupts
from sandbox_image.worker.interpreter.link import CallLink
from sandbox_image.worker.interpreter.namespace import make_namespace
from sandbox_image.worker.interpreter.staged import open_context
from sandbox_image.worker.interpreter.streams import Streams
from sandbox_image.worker.interpreter.variables import variable_names

_RECEIVE_BYTES = 65_536


class Interpreter:
    """Serves the control socket, in the main thread."""

    def __init__(self, control: socket.socket, calls: socket.socket) -> None:
        self._control = control
        self._decoder = FrameDecoder()
        self._pid = os.getpid()
        self._interrupts = Interrupts()
        self._streams = Streams()
        self._link = CallLink(calls, self._interrupts)
        self._final = FinalAnswer()
        self._namespace = make_namespace()
        self._preset: frozenset[str] = frozenset()
        self._runner = CellRunner(self._namespace, self._interrupts)
        threading.excepthook = report_thread_error
        os.register_at_fork(after_in_child=self._let_go)

    def serve(self) -> None:
        """Serve until the worker closes the socket."""
        # What start-up made stays: collections need not look at it, nor forked children copy it.
        gc.collect()
        gc.freeze()
        self._send({"kind": protocol.READY})
        while data := self._control.recv(_RECEIVE_BYTES):
            for frame in self._decoder.feed(data):
                if frame.header["kind"] == protocol.LEASE:
                    self._lease(frame.header)
                else:
                    self._run_cell(frame.header["cell_id"], frame.payload)

    def _lease(self, terms: Any) -> None:
        own = open_context(terms["context_dir"], terms["max_str_bytes"])
        self._namespace["context"] = own.value
        self._preset = frozenset(self._namespace)
        self._link.window = max(1, terms["max_concurrent_calls"])
        self._final.max_bytes = terms["max_answer_bytes"]
        names.connect(
            names.Run(self._link, self._final, self._namespace, self._preset, own, terms["max_prompt_bytes"])
        )
        self._send({"kind": protocol.LEASED})

    def _run_cell(self, cell_id: int, source: bytes) -> None:
        self._streams.restore()
        self._namespace["__builtins__"] = builtins
        self._link.begin_cell(cell_id)
        result = self._runner.run(cell_id, source, self._take_answer_dict)
        self._streams.flush()
        if os.getpid() != self._pid:
            # A process the cell forked came to the cell's end. Going on would make it a second interpreter.
            os._exit(result.exit_code)
        self._link.end_cell()
        self._report(result)

    def _take_answer_dict(self) -> None:
        if os.getpid() == self._pid:
            self._final.offer_dict(self._namespace.get("answer"))

    def _report(self, result: CellResult) -> None:
        content = self._final.content
        if content is not None:
            for start in range(0, len(content), protocol.ANSWER_PART_BYTES):
                self._send({"kind": protocol.ANSWER}, content[start : start + protocol.ANSWER_PART_BYTES])
        variables = variable_names(self._namespace, self._preset)
        self._send(
            {
                "kind": protocol.ENDED,
                "outcome": result.outcome,
                "variables": variables[: protocol.VARIABLES_LISTED],
                "answer_bytes": None if content is None else len(content),
                "used_up": result.used_up,
            },
            result.traceback,
        )

    def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self._control.sendall(encode(Frame(header, payload)))

    def _let_go(self) -> None:
        self._control.close()
        self._link.abandon()

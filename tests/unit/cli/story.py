"""Events for tests: a run tree told step by step, with a clock of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from orchestrator import trajectory
from orchestrator.budget import Amounts
from orchestrator.ids import RunId
from orchestrator.pricing import Usage
from orchestrator.trajectory import Event, Payload

ROOT = RunId("rroot")


@dataclass(slots=True)
class Story:
    """Makes events with dense numbers, and hands each to the listeners."""

    model: str = "big-model"
    sub_model: str = "small-model"
    now: float = 1_000.0
    events: list[Event] = field(default_factory=list)

    def tell(self, payload: Payload, run_id: RunId = ROOT) -> Event:
        seq = sum(event.run_id == run_id for event in self.events)
        event = Event(run_id, seq, self.now, payload)
        self.events.append(event)
        return event

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def start(
        self, run_id: RunId = ROOT, *, parent: RunId | None = None, question: str = "why?", depth: int = 0
    ) -> Event:
        return self.tell(
            trajectory.RunStarted(
                question=question,
                context="one text",
                model=self.model,
                sub_model=self.sub_model,
                depth=depth,
                parent=parent,
                parent_call="",
                limits={},
            ),
            run_id,
        )

    def child(self, number: int, *, question: str = "what of this part?") -> RunId:
        run_id = RunId(f"rchild{number}")
        self.start(run_id, parent=ROOT, question=question, depth=1)
        return run_id

    def turn(self, turn: int, code: str = "print(1)", run_id: RunId = ROOT) -> None:
        self.tell(trajectory.TurnStarted(turn=turn, request_bytes=2_000), run_id)
        self.tell(trajectory.ModelReplied(turn=turn, content="[]", stop="tool_use"), run_id)
        self.tell(trajectory.CellStarted(turn=turn, code=code), run_id)

    def cell_ends(self, turn: int, output: str = "1\n", run_id: RunId = ROOT) -> Event:
        return self.tell(
            trajectory.CellEnded(
                turn=turn,
                outcome="ok",
                output=output,
                output_bytes=len(output.encode("utf-8", "replace")),
                cut_bytes=0,
                traceback="",
                status=0,
                lost_variables=(),
                duration_s=0.3,
                guest_s=0.2,
            ),
            run_id,
        )

    def sandbox_goes(self, turn: int, loss: str, *used_up: str) -> Event:
        return self.tell(
            trajectory.CellEnded(
                turn=turn,
                outcome="sandbox_lost" if loss else "ok",
                output="",
                output_bytes=0,
                cut_bytes=0,
                traceback="",
                status=0,
                lost_variables=(),
                duration_s=0.3,
                guest_s=0.2,
                used_up=used_up,
                loss=loss,
            )
        )

    def sub_call_starts(self, call: str, *, what: str = "complete", run_id: RunId = ROOT) -> Event:
        return self.tell(
            trajectory.SubCallStarted(
                call=call, turn=1, what=what, model="", prompt="p", request_hash="h", occurrence=0
            ),
            run_id,
        )

    def sub_call_ends(self, call: str, *, error: str = "", run_id: RunId = ROOT) -> Event:
        return self.tell(
            trajectory.SubCallEnded(
                call=call, answer="a", error=error, error_kind="", memoised=False, duration_s=1.0
            ),
            run_id,
        )

    def pays(self, call: str, *, tokens: int = 100, microusd: int = 50, unconfirmed: bool = False) -> None:
        bill = Amounts(tokens=tokens, cost_microusd=microusd, calls=1)
        none = Amounts()
        self.tell(trajectory.CallHeld(call=call, attempt=1, model="m", input_bound_tokens=tokens, held=bill))
        self.tell(
            trajectory.CallSettled(
                call=call,
                attempt=1,
                model="m",
                input_bound_tokens=tokens,
                usage=Usage() if unconfirmed else Usage(input=tokens - 10, output=10),
                confirmed=none if unconfirmed else bill,
                unconfirmed=bill if unconfirmed else none,
                error="dropped" if unconfirmed else "",
                duration_s=1.0,
            )
        )

    def end(self, outcome: str = "answered", error: str = "", run_id: RunId = ROOT, turns: int = 1) -> Event:
        return self.tell(
            trajectory.RunEnded(outcome=outcome, answer=None, error=error, turns=turns, duration_s=3.0),
            run_id,
        )


def unsafe_characters(text: str) -> Iterator[str]:
    """Whatever could move a cursor, reorder text or hide it; newlines are left to the caller."""
    for char in text:
        code = ord(char)
        control = char != "\n" and (code < 0x20 or 0x7F <= code < 0xA0)
        reordering = 0x2028 <= code < 0x202F or 0x2066 <= code < 0x206A
        if control or reordering or 0xD800 <= code < 0xE000:
            yield char

"""How many holds the ledger takes and settles in a second: `python -m bench.budget`."""

import json
import time
from pathlib import Path

from bench import broker
from orchestrator.budget import Account, Amounts, Ask, Ledger

RESULTS = Path(__file__).parent / "results" / "budget.json"
_DEPTHS = (1, 2, 4)
_HOLDS = 50_000
_ROUNDS = 5


def holds_per_second(depth: int) -> float:
    """Of one account with so many on its path, itself included; the best of a few rounds."""
    ledger = Ledger()
    account: Account | None = None
    for _ in range(depth):
        account = ledger.open_account("run", Amounts(10**15, 10**15, 10**9, 10**9), account)
    assert account is not None
    ask = Ask(
        fixed=Amounts(tokens=1_000, cost_microusd=500, calls=1),
        output_tokens=4_096,
        least_output_tokens=256,
        output_microusd_per_mtok=5_000_000,
    )
    billed = Amounts(tokens=900, cost_microusd=400, calls=1)
    best_s = float("inf")
    for _ in range(_ROUNDS):
        # Of this process: what else runs on the machine is not the ledger's fault.
        started_s = time.process_time()
        for _ in range(_HOLDS):
            ledger.settle(ledger.request(account, ask), confirmed=billed)
        best_s = min(best_s, time.process_time() - started_s)
    return _HOLDS / best_s


def main() -> None:
    """Print one line for each depth, then what the broker adds to a sub-call; keep both."""
    measured = {depth: round(holds_per_second(depth)) for depth in _DEPTHS}
    for depth, rate in measured.items():
        print(f"depth {depth}: {rate:,} holds and settles per second of CPU time")
    RESULTS.parent.mkdir(exist_ok=True)
    by_depth = {f"depth_{depth}": rate for depth, rate in measured.items()}
    RESULTS.write_text(json.dumps({"holds_and_settles_per_cpu_second": by_depth}, indent=2) + "\n")
    broker.main()


if __name__ == "__main__":
    main()

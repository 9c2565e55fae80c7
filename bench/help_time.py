"""How long `rlm --help` takes, from starting the program to its end: `python -m bench.help_time`."""

import subprocess
import sys
import time
from pathlib import Path

from bench.measuring import at_most, keep, spread_ms

_TIMES = 30
_AIM_S = 0.3


def main() -> None:
    """Print the median and keep all, beside the time that Python alone takes."""
    rlm = Path(sys.executable).with_name("rlm")
    ways = {"rlm --help": [str(rlm), "--help"], "python -c pass": [sys.executable, "-c", "pass"]}
    took_s: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(_TIMES + 1):
        for way, command in ways.items():
            started_s = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                took_s[way].append(time.perf_counter() - started_s)
    measured = {way: spread_ms(times) for way, times in took_s.items()}
    print(measured)
    median_s = round(measured["rlm --help"]["p50"] / 1_000, 3)
    aims = [at_most("`rlm --help`, p50", median_s, _AIM_S, " s")]
    keep("help_time", {"aims": aims, "took_ms": measured})


if __name__ == "__main__":
    main()

"""Writes docs/performance.md and its plots from the results: `python -m bench.page`.

Every figure on the page is looked up in `bench/results/*.json`; what people say of them is in `words.toml`.
The same results give the same bytes. A result may hold, besides what is its own:

    aims    [{measure, aim, measured, reached}]                    rows of the table
    bars    [{title, unit, rows: {name: value}, log?}]             plots of values beside one another
    growth  [{title?, x_name, y_name, x: [...], y: [...]}]         plots of cost as the work grows, or, with
            [{title?, x_name, y_name, series: {name: {x, y}}}]     several lines, of whatever changes with it
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measuring import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
PLOTS = DOCS / "plots"
WORDS = Path(__file__).with_name("words.toml")
_FIRST = ("cells", "peers", "pool", "cold_start", "sandbox_cost", "big_context", "staging", "fan_out", "tree")
_WIDTH_IN, _BAR_IN, _PLOT_IN = 7.0, 0.3, 2.6
_STYLE: dict[Any, Any] = {
    # Text stays text, and ids are not random: the file is small, and the same for the same figures.
    "svg.fonttype": "none",
    "svg.hashsalt": "rlm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Result = Mapping[str, Any]


def main() -> None:
    """Write the page and the plots."""
    mpl.rcParams.update(_STYLE)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    words = tomllib.loads(WORDS.read_text())
    PLOTS.mkdir(parents=True, exist_ok=True)
    for old in PLOTS.glob("*.svg"):
        old.unlink()
    names = sorted(results, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    lines = ["# How fast it is", "", *_paragraphs(words["page"]["intro"], {}), ""]
    lines += [*_aims(names, results), ""]
    for name in names:
        lines += _section(name, results[name], words.get(name, {}))
    lines += ["## The machine", "", *_machine(names, results)]
    path = DOCS / "performance.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    print(path)


def _aims(names: Sequence[str], results: Mapping[str, Result]) -> Iterator[str]:
    yield "| measure | measured | aim | reached |"
    yield "|---|---|---|---|"
    for name in names:
        for row in results[name].get("aims", ()):
            reached = "yes" if row["reached"] else "**no**"
            yield f"| [{row['measure']}](#{name}) | {row['measured']} | {row['aim']} | {reached} |"


def _section(name: str, result: Result, words: Mapping[str, str]) -> Iterator[str]:
    yield f'<a id="{name}"></a>'
    yield f"## {words.get('title', name.replace('_', ' ').capitalize())}"
    yield ""
    if "about" in words:
        yield from _paragraphs(words["about"], result)
        yield ""
    missed = [row for row in result.get("aims", ()) if not row["reached"]]
    for row in missed:
        yield f"* Not reached: {row['measure']}: {row['measured']}, the aim is {row['aim']}."
    if missed:
        yield ""
        if "missed" in words:
            yield from _paragraphs(words["missed"], result)
            yield ""
    for kind, draw in (("bars", _draw_bars), ("growth", _draw_growth)):
        if plots := result.get(kind):
            target = f"{name}-{kind}.svg"
            draw(plots, PLOTS / target)
            yield f"![{'; '.join(_title(plot) for plot in plots)}](plots/{target})"
            yield ""
    yield f"All figures: [`bench/results/{name}.json`](../bench/results/{name}.json)."
    yield ""


def _paragraphs(text: str, result: Result) -> list[str]:
    return re.sub(r"\{([\w., -]+)\}", lambda found: _looked_up(result, found[1]), text.strip()).splitlines()


def _looked_up(result: Result, path: str) -> str:
    value: Any = result
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except LookupError:
            # A part of a benchmark that failed, or the text names what there is not: both are to be seen.
            return "(not measured)"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _title(plot: Mapping[str, Any]) -> str:
    return str(plot.get("title") or f"{plot['y_name']} by {plot['x_name']}")


def _draw_bars(plots: Sequence[Mapping[str, Any]], target: Path) -> None:
    heights = [_BAR_IN * len(plot["rows"]) + 0.8 for plot in plots]
    figure = Figure(figsize=(_WIDTH_IN, sum(heights)), layout="constrained")
    grid = figure.subplots(len(plots), 1, squeeze=False, height_ratios=heights)
    for axes, plot in zip(grid[:, 0], plots, strict=True):
        names, values = list(plot["rows"]), list(plot["rows"].values())
        bars = axes.barh(names, values, color="#4c72b0")
        axes.bar_label(
            bars, [f"{value:,.3g}" if value < 1_000 else f"{value:,.0f}" for value in values], padding=3
        )
        axes.invert_yaxis()
        axes.margins(x=0.12)
        if plot.get("log"):
            axes.set_xscale("log")
        axes.set_title(plot["title"], loc="left")
        axes.set_xlabel(plot["unit"])
    _save(figure, target)


def _draw_growth(plots: Sequence[Mapping[str, Any]], target: Path) -> None:
    rows = -(-len(plots) // 2)
    figure = Figure(figsize=(_WIDTH_IN, _PLOT_IN * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(plots):
            _draw_series(axes, plots[place])
        else:
            axes.set_axis_off()
    _save(figure, target)


def _draw_series(axes: Axes, plot: Mapping[str, Any]) -> None:
    if "series" in plot:
        for name, line in plot["series"].items():
            axes.plot(line["x"], line["y"], "o-", markersize=4, label=name)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    else:
        _draw_cost(axes, plot["x"], plot["y"])
    axes.set_title(_title(plot), loc="left", fontsize=9)
    axes.set_xlabel(plot["x_name"])
    axes.set_ylabel(plot["y_name"])


def _draw_cost(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, "o-", color="#4c72b0", markersize=4)
    if min(x) > 0 and min(y) > 0:
        axes.set_xscale("log")
        axes.set_yscale("log")
        # What grows faster than its work is a defect: it would be steeper than this.
        axes.plot(x, [y[-1] * at / x[-1] for at in x], ":", color="#888888", linewidth=1)


def _save(figure: Figure, target: Path) -> None:
    figure.savefig(target, metadata={"Date": None, "Creator": None})


def _machine(names: Sequence[str], results: Mapping[str, Result]) -> Iterator[str]:
    yield "| benchmark | cores | memory, GiB | kernel | Python | grpcio | load after |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        machine = results[name].get("machine", {})
        facts = ("cores", "memory_gib", "kernel", "python", "grpcio", "load_after")
        yield f"| {name} | " + " | ".join(str(machine.get(fact, "")) for fact in facts) + " |"


if __name__ == "__main__":
    main()

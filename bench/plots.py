"""Plots of a run, PNG and SVG: throughput against batch, a roofline, memory against depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .environment import Environment
from .harness import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

# A provider looks the same in every plot: a colour that colour-blind readers tell apart (Okabe and Ito), a marker.
_BLACK, _ORANGE, _GREY = ("#000000", "o"), ("#D55E00", "^"), ("#999999", "D")
_LOOKS = {
    **dict.fromkeys(("eager", "store", "dense"), _BLACK),
    **dict.fromkeys(("linfast", "invert", "factored"), _ORANGE),
    **dict.fromkeys(("materialised", "gather + bmm", "conv2d 1x1"), _GREY),
    "torch.compile": ("#0072B2", "s"),
    "linfast compiled": ("#E69F00", "v"),
    "normflows": ("#009E73", "P"),
    "nflows": ("#56B4E9", "X"),
    "zuko": ("#CC79A7", "*"),
    "FrEIA": ("#7F7F00", "p"),
    "FrEIA GLOW": ("#7F7F00", "h"),
    "glasflow": ("#8B4513", "d"),
}
_OTHER = ("#777777", ".")
_MOST_PANELS = 9
_WORDS = {"float32": "fp32", "bfloat16": "bf16"}
_COMPILED = ("torch.compile", "linfast compiled")

Panel = tuple[str, list[Result]]


def draw(results: Sequence[Result], environment: Environment, folder: str | Path) -> list[Path]:
    """Write the plots that the results have points for; their paths, PNG and SVG each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [result for result in results if result.p50_ms is not None]
    written = []
    with pyplot.style.context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "linfast"}):
        for name, make in {"throughput": _throughput, "roofline": _roofline, "memory": _memory}.items():
            if (figure := make(timed, environment)) is None:
                continue
            for suffix in ("png", "svg"):
                written.append(Path(folder) / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            pyplot.close(figure)
    return written


def _throughput(results: Sequence[Result], environment: Environment) -> Figure | None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    panels = sorted(_panels(results, "batch"), key=lambda panel: -len(panel[1]))[:_MOST_PANELS]

    def fill(axes: Axes, along: Sequence[Result]) -> None:
        _lines(axes, along, "batch", lambda r: 1e3 * int(r.size["batch"]) / (r.p50_ms or 1.0))
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(sorted({int(r.size["batch"]) for r in along}), minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}" if x < 1e4 else f"{x / 1024:.0f}Ki"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter())

    return _grid(panels, fill, ("batch", "samples / s"), f"Throughput. {_where(environment)}")


def _memory(results: Sequence[Result], environment: Environment) -> Figure | None:
    panels = list(_panels([r for r in results if r.peak_bytes], "depth"))[:_MOST_PANELS]

    def fill(axes: Axes, along: Sequence[Result]) -> None:
        _lines(axes, along, "depth", lambda r: (r.peak_bytes or 0) / 2**20)
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({int(r.size["depth"]) for r in along}))

    title = f"Memory of one call above weights and inputs. {_where(environment)}"
    return _grid(panels, fill, ("couplings", "peak, MiB"), title)


def _roofline(results: Sequence[Result], environment: Environment) -> Figure | None:
    """Ours: linfast where it is a provider of its own, else eager, which then is linfast."""
    from matplotlib import pyplot

    copy = environment.get("copy_bytes_per_s")
    named = [result for result in results if result.provider.startswith("linfast")]
    ours = named or [result for result in results if result.provider in ("eager", "torch.compile")]
    found = {dtype: environment.get(f"matmul_{dtype}_per_s") for dtype in dict.fromkeys(r.dtype for r in ours)}
    roofs = {dtype: roof for dtype, roof in found.items() if isinstance(roof, (int, float))}
    if not roofs or not isinstance(copy, (int, float)):
        return None
    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    intensities = [result.operations / result.bytes for result in ours]
    low, high = min(intensities) / 2, max(*intensities, *(roof / copy for roof in roofs.values())) * 3
    for dtype, roof in roofs.items():
        axes.plot([low, roof / copy, high], [copy * low, roof, roof], color="#444444", linewidth=1.2)
        label = f"matmul {_WORDS.get(dtype, dtype)}, {roof:.3g} / s"
        axes.annotate(label, (high, roof), xytext=(0, 4), textcoords="offset points", ha="right")
    middle = (low * min(roofs.values()) / copy) ** 0.5
    label = f"copy, {copy / 1e9:.3g} GB/s"
    axes.annotate(label, (middle, copy * middle), xytext=(-6, 6), textcoords="offset points", ha="right")
    cases = list(dict.fromkeys(result.case for result in ours))
    colours = {case: f"C{i}" for i, case in enumerate(cases)}
    for result, intensity in zip(ours, intensities, strict=True):
        rate, colour = 1e3 * result.operations / (result.p50_ms or 1.0), colours[result.case]
        face = "none" if result.provider in _COMPILED else colour
        axes.scatter(intensity, rate, s=36, marker="o", facecolors=face, edgecolors=colour)
    for case in cases:
        axes.scatter([], [], color=colours[case], label=case)
    axes.scatter([], [], facecolors="none", edgecolors="#444444", label="hollow: compiled")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte, at the fewest bytes", ylabel="operations / s")
    axes.grid(alpha=0.25, which="major")
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(f"Roofline: {'linfast' if named else 'eager, which is linfast here'}. {_where(environment)}")
    return figure


def _panels(results: Sequence[Result], axis: str) -> Iterator[Panel]:
    """(title, results) for each case and rest of its size with at least two values of ``axis``."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if axis in result.size:
            rest = ", ".join(
                _WORDS.get(value, value) if isinstance(value, str) else f"{key} {value}"
                for key, value in result.size.items()
                if key != axis
            )
            groups.setdefault((result.case, rest), []).append(result)
    for (case, rest), along in groups.items():
        if len({result.size[axis] for result in along}) > 1:
            yield f"{case}\n{rest}", along


def _lines(axes: Axes, along: Sequence[Result], axis: str, value: Callable[[Result], float]) -> None:
    for provider in dict.fromkeys(result.provider for result in along):
        own = sorted((r for r in along if r.provider == provider), key=lambda r: int(r.size[axis]))
        colour, marker = _LOOKS.get(provider, _OTHER)
        xs, ys = [int(r.size[axis]) for r in own], [value(r) for r in own]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=provider)


def _grid(
    panels: Sequence[Panel], fill: Callable[[Axes, Sequence[Result]], None], labels: tuple[str, str], title: str
) -> Figure | None:
    """One plot per panel, one legend for all."""
    from matplotlib import pyplot

    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(3.4 * columns, 5.5) + 1.6, 2.7 * rows + 0.6)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (name, along) in zip(grid.flat, panels, strict=False):
        fill(axes, along)
        axes.set_title(name, fontsize=8)
        axes.grid(alpha=0.25, which="major")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(labels[0], fontsize=9)
    figure.supylabel(labels[1], fontsize=9)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure


def _where(environment: Environment) -> str:
    threads = environment.get("threads")
    about = [environment.get("device"), f"{threads} thread(s)", f"torch {environment.get('torch')}"]
    return ", ".join(str(part) for part in [*about, environment.get("date")] if part is not None)

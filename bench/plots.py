"""Plots of a run as PNG and SVG: throughput against batch, a roofline, memory against depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .environment import Environment
from .harness import Result
from .report import size_in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES, SUFFIXES = ("throughput", "roofline", "memory"), ("png", "svg")  # of the files

# A provider has the same colour, from a palette for colour-blind readers (Okabe and Ito), and marker in every plot.
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
_COMPILED = ("torch.compile", "linfast compiled")


def draw(results: Sequence[Result], environment: Environment, folder: str | Path) -> list[Path]:
    """Write each plot that the results have points for, as PNG and SVG; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [result for result in results if result.p50_ms is not None]
    kept = [result for result in timed if result.peak_bytes]
    where = _where(environment)
    memory, written = f"Memory of one call above weights and inputs. {where}", list[Path]()
    with pyplot.style.context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "linfast"}):
        figures = (
            _panels(timed, "batch", _samples_per_second, "samples / s", f"Throughput. {where}"),
            _roofline(timed, environment),
            _panels(kept, "depth", _peak_mib, "peak, MiB", memory),
        )
        for name, figure in zip(NAMES, figures, strict=True):
            if figure is None:
                continue
            for suffix in SUFFIXES:
                written.append(Path(folder) / f"{name}.{suffix}")
                figure.savefig(written[-1], dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            pyplot.close(figure)
    return written


@dataclass(frozen=True)
class Gain:
    """A task's time with a library's own code and after ``lf.accelerate``, as a table of a page of docs/ has it."""

    task: str  # sampling, density or training
    model: str
    before: str
    after: str
    unit: str  # of both times
    page: str

    @property
    def share(self) -> float:
        """The time after as a share of the time before."""
        return float(self.after) / float(self.before)


def draw_gains(gains: Sequence[Gain], path: Path) -> None:
    """A bar per gain: its time after as a share of that before. The background is white, also on dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    ink = "#222222"
    with pyplot.style.context({"font.size": 9, "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink}):
        figure, axes = pyplot.subplots(figsize=(8, 0.46 * len(gains) + 0.9), layout="constrained")
        for i, gain in enumerate(gains):
            faster = f"{1 / gain.share:.2g} times as fast" if gain.share < 0.95 else "as fast as before"
            axes.barh(i, 1.0, height=0.42, color="#d9d9d9")
            axes.barh(i, gain.share, height=0.42, color=_ORANGE[0])
            axes.text(0, i - 0.28, gain.task, va="bottom", weight="bold")
            axes.text(0.115, i - 0.28, gain.model, va="bottom")
            axes.text(1.015, i, faster, va="center", weight="bold")
            axes.text(1.015, i - 0.28, f"{gain.before} to {gain.after} {gain.unit}", va="bottom")
        axes.set(xlim=(0, 1.235), ylim=(len(gains) - 0.5, -0.75), yticks=[])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(
            "time after lf.accelerate(model), as a share of the time of the library's own code (grey)", x=0.405
        )
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the bytes


def _samples_per_second(result: Result) -> float:
    return 1e3 * int(result.size["batch"]) / (result.p50_ms or 1.0)


def _peak_mib(result: Result) -> float:
    return (result.peak_bytes or 0) / 2**20


def _panels(
    results: Sequence[Result], axis: str, value: Callable[[Result], float], unit: str, title: str
) -> Figure | None:
    """One panel for each case and size that has several values of ``axis``, with one legend for all."""
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    groups: dict[str, list[Result]] = {}
    for result in results:
        if axis in result.size:
            groups.setdefault(f"{result.case}\n{size_in_words(result, but=axis)}", []).append(result)
    panels = [(name, along) for name, along in groups.items() if len({r.size[axis] for r in along}) > 1]
    panels = sorted(panels, key=lambda panel: -len(panel[1]))[:_MOST_PANELS]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(3.4 * columns, 5.5) + 1.6, 2.7 * rows + 0.6)
    figure, places = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in places.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, along) in zip(places.flat, panels, strict=False):
        for provider in dict.fromkeys(result.provider for result in along):
            own = sorted((r for r in along if r.provider == provider), key=lambda r: int(r.size[axis]))
            colour, marker = _LOOKS.get(provider, _OTHER)
            xs, ys = [int(r.size[axis]) for r in own], [value(r) for r in own]
            axes.plot(xs, ys, color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=provider)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({int(r.size[axis]) for r in along}), list(map(str, ticks)))
        if axis == "batch":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(EngFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=8)
        axes.grid(alpha=0.25, which="major")
    figure.supxlabel(axis, fontsize=9)
    figure.supylabel(unit, fontsize=9)
    handles = {label: h for axes in places.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure


def _roofline(results: Sequence[Result], environment: Environment) -> Figure | None:
    """The roofline with the operations per second of linfast, or of eager where linfast runs eager."""
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
        label = f"matmul {dtype}, {roof:.3g} / s"
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


def _where(environment: Environment) -> str:
    threads = environment.get("threads")
    about = [environment.get("device"), f"{threads} thread(s)", f"torch {environment.get('torch')}"]
    return ", ".join(str(part) for part in [*about, environment.get("date")] if part is not None)

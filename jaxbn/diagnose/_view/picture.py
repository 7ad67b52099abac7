"""The picture of a report: one row for each layer."""

from __future__ import annotations

import math
import os
import pathlib
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from jaxbn._extras import need
from jaxbn._statistics.drift import Array
from jaxbn.diagnose._results import LayerReport, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

# Each mark has a shape, too, for readers who see red and green as one colour.
_MARKS = {"error": ("tab:red", "X"), "warning": ("tab:orange", "^"), "note": ("tab:cyan", "D"), "": ("tab:green", "o")}
_BINS = 30
# Axes of differences are linear up to 0.1, so that 0 has a place, and logarithmic beyond.
_LINEAR = 0.1
_PURPOSE = "to draw a report"


def check(path: str | os.PathLike[str]) -> None:
    """Raises an error if no picture can be saved as `path`."""
    path = pathlib.Path(path)
    formats = need("matplotlib.backend_bases", _PURPOSE).FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise ValueError(
            "path: expected a picture in a format that matplotlib writes, such as .png, .pdf or .svg, "
            f"got {path.name}; rename it"
        )
    if path.is_dir():
        raise ValueError(f"path: expected the name of a picture, got the folder {path}; add a name, such as report.png")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path: expected a picture in a folder that exists, got {path}; make the folder {path.parent} first"
        )


def figure_of(results: Results) -> Figure:
    """Returns the picture, a figure of matplotlib; see `Report.draw`."""
    layers = results.layers
    marks = [_MARKS[results.severity_of(layer.path)] for layer in layers]
    measured = any(layer.own is not None for layer in layers)
    columns = 3 if measured else 2
    # In inches: names, panels, colour bar; title, axes, legend.
    width = 0.075 * max(len(layer.path) for layer in layers) + 3.3 * columns + 1.2
    height = 1.8 + max(0.2 * len(layers), 1.4)
    figure: Figure = need("matplotlib.figure", _PURPOSE).Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    if measured:
        _bars(panels[0], layers, marks)
        shifts, ratios = [layer.shift for layer in layers], [layer.ratio for layer in layers]
        names = "|batch mean - running mean|, in running std", "batch variance / running variance"
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            shifts, ratios = [layer.mean / np.sqrt(layer.var) for layer in layers], [layer.var for layer in layers]
        names = "running mean / running std", "running variance"
    _histograms(panels[-2], shifts, names[0], logarithmic=False)
    image = _histograms(panels[-1], ratios, names[1], logarithmic=True)
    bar = figure.colorbar(image, ax=panels, pad=0.01, fraction=0.03, shrink=min(1, 4 / height), aspect=20)
    bar.set_ticks([0, 0.02, 0.1, 0.25, 0.5, 1], labels=["0", "2%", "10%", "25%", "50%", "100%"], fontsize="small")
    bar.set_label("share of channels", fontsize="small")
    panels[0].set_ylim(len(layers) - 0.5, -0.5)
    panels[0].set_yticks(range(len(layers)), [layer.path.replace("$", r"\$") for layer in layers], fontsize="small")
    panels[0].tick_params(axis="y", length=0, pad=14)
    beside = {"transform": panels[0].get_yaxis_transform(), "clip_on": False}
    for row, (colour, marker) in enumerate(marks):
        panels[0].plot(-0.03, row, marker, color=colour, markersize=6, **beside)
    _legend(figure, measured)
    # About 11 characters per inch.
    figure.suptitle("\n".join(textwrap.wrap(results.summary(), int(11 * width))), fontsize="medium")
    return figure


def _legend(figure: Figure, measured: bool) -> None:
    patch, line = need("matplotlib.patches", _PURPOSE).Patch, need("matplotlib.lines", _PURPOSE).Line2D
    handles = [
        line([], [], color=colour, marker=marker, linestyle="", label=severity or "no finding")
        for severity, (colour, marker) in _MARKS.items()
    ]
    if measured:
        handles.append(patch(color="0.6", label="this layer alone"))
        handles.append(line([], [], color="black", marker=".", linestyle="", label="with earlier layers"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")


def _bars(axes: Axes, layers: list[LayerReport], marks: list[tuple[str, str]]) -> None:
    high = 1.0
    for row, (layer, (colour, _)) in enumerate(zip(layers, marks, strict=True)):
        own, passed_on = _finite(layer.own), _finite(layer.passed_on)
        axes.barh(row, own or 0, color=colour, height=0.6)
        if passed_on is not None:
            axes.plot(passed_on, row, "k.", markersize=5)
        if (own, passed_on) != (layer.own, layer.passed_on):
            axes.text(own or 0, row, " NaN or infinite", va="center", fontsize="small")
        high = max(high, own or 0, passed_on or 0)
    high *= 1.1
    axes.set_xscale("symlog", linthresh=_LINEAR, linscale=0.4)
    axes.set_xlim(0, high)
    _ticks(axes, 0, high)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("difference between train and eval (rms)")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _histograms(axes: Axes, arrays: list[Array | None], label: str, *, logarithmic: bool) -> QuadMesh:
    """One row per layer: the share of its channels in each bin, darker for more; grey where nothing was measured."""
    finite = [np.zeros(0) if a is None else a[np.isfinite(a)] for a in arrays]
    every = np.concatenate(finite)
    if logarithmic:
        positive = every[every > 0]
        low, high = (positive.min() / 1.2, positive.max() * 1.2) if positive.size else (0.5, 2.0)
        low, high = min(low, 0.5), max(high, 2.0)
        axes.set_xscale("log")
    else:
        low, high = (min(every.min(), 0.0), max(every.max(), 0.2)) if every.size else (0.0, 1.0)
        axes.set_xscale("symlog", linthresh=_LINEAR, linscale=0.4)
    # Bins of equal width on the axis.
    scale = axes.xaxis.get_transform()
    left, right = scale.transform(np.array([low, high]))
    edges = scale.inverted().transform(np.linspace(left, right, _BINS + 1))
    rows = np.full((len(arrays), _BINS), np.nan)
    for row, values in zip(rows, finite, strict=True):
        if values.size:
            # Variances of 0 and below have no place on a logarithmic axis; they count at its left end.
            row[:] = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / values.size
    axes.set_facecolor("0.85")
    norm = need("matplotlib.colors", _PURPOSE).PowerNorm(0.5, 0, 1)
    image = axes.pcolormesh(edges, np.arange(len(arrays) + 1) - 0.5, rows, cmap="Blues", norm=norm)
    _ticks(axes, low, high)
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    return image


def _ticks(axes: Axes, low: float, high: float) -> None:
    """Labels round numbers, at most eight."""
    largest = max(abs(low), abs(high))
    smallest = low if low > 0 else _LINEAR
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
    for digits, step in ((1, 2, 5), 1), ((1, 3), 1), *(((1,), step) for step in range(1, 100)):
        sizes = [digit * 10.0**power for power in range(first, last + 1, step) for digit in digits]
        ticks = [t for t in sorted({0.0, *sizes, *(-size for size in sizes)}) if low <= t <= high]
        if len(ticks) <= 8:
            break
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize="small")
    axes.set_xticks([], minor=True)

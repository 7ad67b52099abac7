"""The picture of a report."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxbn._extras import need

if TYPE_CHECKING:
    from jaxbn.diagnose._report import Report

_COLOURS = {"error": "tab:red", "warning": "tab:orange", "note": "tab:cyan", "": "tab:green"}
_BINS = 24


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    figure_class = need("matplotlib.figure", "to draw a report").Figure
    layers = report.layers
    measured = [layer for layer in layers if layer.own is not None]
    height = 2.0 + 0.28 * len(layers)
    figure = figure_class(figsize=(12 if measured else 9, height), layout="constrained")
    panels = figure.subplots(1, 3 if measured else 2, squeeze=False)[0]
    names = [layer.path for layer in layers]
    with np.errstate(invalid="ignore", divide="ignore"):
        if measured:
            _bars(panels[0], report)
            values = (
                [layer.shift for layer in layers],
                [None if layer.ratio is None else np.log2(layer.ratio) for layer in layers],
            )
            titles = "mean shift, running std", "log2 of batch / running variance"
        else:
            values = [layer.mean / np.sqrt(layer.var) for layer in layers], [np.log10(layer.var) for layer in layers]
            titles = "running mean / running std", "log10 of running variance"
    for axes, arrays, title in zip(panels[-2:], values, titles, strict=True):
        _histograms(axes, arrays, title)
    for number, axes in enumerate(panels):
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_yticks(range(len(layers)), names if number == 0 else [""] * len(layers))
    figure.suptitle(report.summary(), fontsize="medium", wrap=True)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, report: Report) -> None:
    for number, layer in enumerate(report.layers):
        worst = report.severity_of(layer.path)
        if layer.own is not None and np.isfinite(layer.own):
            axes.barh(number, layer.own, color=_COLOURS[worst], height=0.7)
        if layer.passed_on is not None and np.isfinite(layer.passed_on):
            label = "with what earlier layers contribute" if number == 0 else None
            axes.plot(layer.passed_on, number, "k.", markersize=5, label=label)
    # Linear near 0, so that a layer without any difference has its place.
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("train - eval: this layer's own (bar)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", loc="lower right")


def _histograms(axes: Any, arrays: list[Any], title: str) -> None:
    """One row per layer: the share of its channels in each bin, darker for more."""
    finite = [np.zeros(0) if a is None else a[np.isfinite(a)] for a in arrays]
    every = np.concatenate(finite) if finite else np.zeros(0)
    low, high = (float(every.min()), float(every.max())) if every.size else (0.0, 1.0)
    # A histogram of equal values needs a width, too.
    edges = np.linspace(low, max(high, low + 1e-3), _BINS + 1)
    rows = np.stack([np.histogram(a, edges)[0] / max(a.size, 1) for a in finite])
    axes.imshow(
        rows,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(edges[0], edges[-1], len(arrays) - 0.5, -0.5),
    )
    axes.set_xlabel(f"{title} (share of channels)")

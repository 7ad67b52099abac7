"""The report of a diagnosis: what it holds, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

from jaxbn.diagnose._draw import check, figure_of
from jaxbn.diagnose._html import html
from jaxbn.diagnose._layer_report import LayerReport, layer_dict
from jaxbn.diagnose._not_checked import NotChecked
from jaxbn.diagnose._rules import DIFFERENCES, SEVERITIES, Finding
from jaxbn.diagnose._text import plain, print_rich


@dataclasses.dataclass(frozen=True)
class Report:
    """What a diagnosis found.

    `str(report)` is plain text of 80 columns, `report.print()` is coloured and as wide as the terminal, and Jupyter
    shows HTML. Each shows the most important figures of each layer and findings in groups; `verbose=True` shows all.

    Attributes:
      layers: the numbers of each norm layer, in the order in which the network calls them.
      findings: what is wrong, one finding for each layer; the worst first.
      parts_at: path of the first layer that by itself makes train and eval differ by more than a threshold, or None.
      output_difference: root mean square difference of the network's outputs in train and in eval
        mode, relative to that in train mode; None without batches.
      not_checked: the checks that were not made, and what each needs.

    Example:
      >>> import numpy as np
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> tree = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
      >>> report = diagnose_statistics(tree)
      >>> report.ok, [f.kind for f in report.errors]
      (False, ['untouched'])
    """

    layers: list[LayerReport]
    findings: list[Finding]
    parts_at: str | None = None
    output_difference: float | None = None
    not_checked: list[NotChecked] = dataclasses.field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings of severity "error"."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """Returns the report as HTML: what Jupyter shows."""
        return html(self)

    def summary(self) -> str:
        """Returns one line: the number of findings, the difference between train and eval, and where it begins."""
        counts = [(sum(f.severity == s for f in self.findings), s) for s in SEVERITIES]
        parts = [f"{n} {s}{'' if n == 1 else 's'}" for n, s in counts if n]
        text = f"{len(self.layers)} norm layer{'s' * (len(self.layers) != 1)}: " + (", ".join(parts) or "no findings")
        if self.output_difference is not None:
            text += f"; outputs in train and eval mode differ by {self.output_difference:.2g}"
        return (
            text if self.parts_at is None else f"{text}; the first layer whose statistics do not fit is {self.parts_at}"
        )

    def to_text(self, *, verbose: bool = False, width: int = 80) -> str:
        """Returns the report as plain text; `str(report)` is the short one.

        Args:
          verbose: whether to show all figures of each layer and all layers of each finding, rather than the most
            important figures and the first layers.
          width: of the lines, in characters. Layer names that do not fit are shortened in the middle. The table of a
            verbose report is as wide as it has to be.

        Example:
          >>> import numpy as np
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> tree = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
          >>> print(diagnose_statistics(tree).to_text().splitlines()[3])
          error: untouched
        """
        return plain(self, verbose=verbose, width=width)

    def print(self, *, verbose: bool = False) -> None:
        """Prints the report in colour, as wide as the terminal; needs rich.

        Args:
          verbose: as in `to_text`.

        Raises:
          ImportError: rich is not installed.
        """
        print_rich(self, verbose=verbose)

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """Returns the report as dictionaries, lists, strings and numbers.

        Args:
          channels: whether to include the arrays of each layer, rather than their extremes alone.

        Returns:
          `ok`, `parts_at`, `output_difference`, `findings`, `not_checked` and `layers`. Arrays are lists.

        Example:
          >>> import numpy as np
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> tree = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
          >>> diagnose_statistics(tree).to_dict()["findings"][0]["severity"]
          'error'
        """
        return {
            "ok": self.ok,
            "parts_at": self.parts_at,
            "output_difference": self.output_difference,
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "not_checked": [dataclasses.asdict(n) for n in self.not_checked],
            "layers": [layer_dict(layer, channels) for layer in self.layers],
        }

    def to_json(self, *, channels: bool = False) -> str:
        """Returns `to_dict` as JSON; numbers that JSON does not have are the strings "nan", "inf" and "-inf".

        Example:
          >>> import json, numpy as np
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> tree = {"norm": {"mean": np.array([np.nan]), "var": np.ones(1)}}
          >>> json.loads(diagnose_statistics(tree).to_json(channels=True))["layers"][0]["mean"]
          ['nan']
        """
        return json.dumps(_finite(self.to_dict(channels=channels)), indent=2, allow_nan=False)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Saves a picture with one row for each layer.

        Bars show the difference between train and eval that the layer alone makes, dots that of its output, with what
        earlier layers contribute. Histograms show the mean shift and the variance ratio of the layer's channels, or,
        without batches, the running statistics; rows in grey were not measured. Marks and colours show the worst
        finding about the layer.

        Args:
          path: of the file; its ending says which format.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: matplotlib does not write this format, or `path` is a folder.
          FileNotFoundError: the folder of the file does not exist.

        Example:
          >>> import numpy as np, pathlib, tempfile
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> report = diagnose_statistics({"norm": {"mean": np.zeros(3), "var": np.ones(3)}})
          >>> file = pathlib.Path(tempfile.mkdtemp()) / "report.png"
          >>> report.draw(file)
          >>> file.exists()
          True
        """
        check(path)
        figure_of(self).savefig(path, dpi=120)

    def severity_of(self, path: str) -> str:
        """Returns the severity of the worst finding about a layer, or "" if there is none."""
        return next((f.severity for f in self.findings if f.layer == path), "")


def ranked(findings: list[Finding], paths: list[str]) -> list[Finding]:
    """Sorts by severity, then causes before differences, which follow from them, then in the order of layers."""
    order = {path: number for number, path in enumerate(["", *paths])}
    return sorted(
        findings,
        key=lambda f: (SEVERITIES.index(f.severity), f.kind in DIFFERENCES, order.get(f.layer, len(order))),
    )


def _finite(value: Any) -> Any:
    """The same with strings for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""The report of a diagnosis: results that can be shown."""

from __future__ import annotations

import dataclasses
import os

from jaxbn.diagnose._results import Results


@dataclasses.dataclass(frozen=True)
class Report(Results):
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

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        """Returns the report as HTML: what Jupyter shows."""
        from jaxbn.diagnose._view.html import html

        return html(self)

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
        from jaxbn.diagnose._view.text import plain

        return plain(self, verbose=verbose, width=width)

    def print(self, *, verbose: bool = False) -> None:
        """Prints the report in colour, as wide as the terminal; needs rich.

        Args:
          verbose: as in `to_text`.

        Raises:
          ImportError: rich is not installed.
        """
        from jaxbn.diagnose._view.text import print_rich

        print_rich(self, verbose=verbose)

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
        from jaxbn.diagnose._view.picture import check, figure_of

        check(path)
        figure_of(self).savefig(path, dpi=120)

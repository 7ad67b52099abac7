"""How far training is: a bar on a terminal, and a line per epoch where the output goes to a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress(Generic[T]):
    """Iterates over `steps`. `note` is shown beside how many are done, and may change at any step."""

    def __init__(self, steps: Sequence[T], name: str, epoch: int):
        """`epoch` is after how many steps there is a line."""
        self.steps, self.name, self.epoch, self.note = steps, name, epoch, ""

    def __iter__(self) -> Iterator[T]:
        # None: no bar where the output is not a terminal, because it would fill a log.
        bar = tqdm(self.steps, desc=self.name, unit="step", disable=None)
        for number, step in enumerate(bar, 1):
            yield step
            if not bar.disable:
                bar.set_postfix_str(self.note)
            elif number % self.epoch == 0 or number == len(self.steps):
                text = f"{self.name}: {number} of {len(self.steps)}"
                print(f"{text}, {self.note}" if self.note else text, file=sys.stderr, flush=True)

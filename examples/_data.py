"""The data of the examples: handwritten digits, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Batches = Iterator[tuple[np.ndarray, np.ndarray]]


class Digits(NamedTuple):
    """Handwritten digits in 8x8 pixels: images float32 [N, 8, 8, 1] in [0, 1], labels int32 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load() -> Digits:
    """Returns scikit-learn's 1797 digits, of which always the same fifth is held out."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(digits: Digits, batch_size: int, seed: int) -> Batches:
    """Yields batches of the training images forever, with each image shifted by at most one pixel."""
    rng = np.random.default_rng(seed)
    padded = np.pad(digits.train_images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # [N, 3, 3, 1, 8, 8]: the nine positions of an 8x8 window in each padded image.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    while True:
        order = rng.permutation(len(digits.train_labels))
        # The incomplete last batch is left out, because its shape would need another compilation.
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            rows, columns = rng.integers(3, size=(2, batch_size))
            yield np.moveaxis(windows[chosen, rows, columns], 1, -1), digits.train_labels[chosen]


def accuracy(logits: ArrayLike, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, axis=-1) == labels))

# /// script
# requires-python = ">=3.11"
# dependencies = ["h5py", "keras==3.15.1", "jax"]
# ///
"""Writes keras_norms.keras, a network of batch norms: `KERAS_BACKEND=jax python -m golden.make_keras`.

Array i of layer k, in the order of Keras' weights, has the values 10 k + i + 1 and 10 k + i + 1.5.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

PATH = Path(__file__).with_name("keras_norms.keras")
# By the name of the layer, and what `weights` has of it.
NORMS = {
    "inner/whole": ("gamma", "beta", "moving_mean", "moving_variance"),
    "no_scale": (None, "moving_mean", "moving_variance"),
    "bare": ("moving_mean", "moving_variance"),
}


def values(layer: int, array: int) -> list[float]:
    return [10 * layer + array + 1, 10 * layer + array + 1.5]


def write() -> None:
    import keras
    import numpy as np

    norm = keras.layers.BatchNormalization
    inner = keras.Sequential([keras.layers.Dense(2, name="dense"), norm(name="whole")], name="inner")
    layers = [inner, norm(scale=False, name="no_scale"), norm(scale=False, center=False, name="bare")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    for number, layer in enumerate((inner.layers[-1], *layers[1:])):
        layer.set_weights([np.float32(values(number, i)) for i in range(len(layer.weights))])
    model.save(PATH)
    # Compressed, which Keras does not do.
    with zipfile.ZipFile(PATH) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(PATH, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)


if __name__ == "__main__":
    write()

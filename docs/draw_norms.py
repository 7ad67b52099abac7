"""Draws docs/norms.png: which values of x share a statistic in each norm.

The picture is computed: each panel's call is run, one value of its output is differentiated with respect to
x, and the values of x with a nonzero gradient are coloured.

    python docs/draw_norms.py --out docs/norms.png
"""

from __future__ import annotations

import argparse
import io
import pathlib

import jax
import numpy as np

import jaxbn

SHAPE = (4, 6, 2, 2)  # N, C, H, W
MARKED = (1, 2, 0, 1)
CALLS = {
    "Batch norm": "jaxbn.batch_norm_train(x, params, state, axis=1)",
    "Batch norm in evaluation": "jaxbn.batch_norm_eval(x, params, state, axis=1)",
    "Virtual batches (ghost batch norm)": "jaxbn.batch_norm_train(x, params, state, axis=1, virtual_batch_size=2)",
    "Instance norm": "jaxbn.instance_norm_train(x, params, state, axis=1)",
    "Group norm": "jaxbn.group_norm(x, params, num_groups=3, axis=1)",
    "Layer norm of whole examples": "jaxbn.layer_norm(x, params, axis=(1, 2, 3), params_axis=1)",
    "Layer norm over channels": "jaxbn.layer_norm(x, params, axis=1)",
    "RMS norm over channels": "jaxbn.rms_norm(x, params, axis=1)",
}
# From the palette of Okabe and Ito, which people with colour blindness can tell apart. The marked cell also has a dot.
SHARED_COLOUR, MARKED_COLOUR, OTHER_COLOUR = "#56B4E9", "#D55E00", "#F2F2F2"


def cells(call: str) -> np.ndarray:
    """Returns which values of x the marked value of the call's output depends on: boolean, of shape `SHAPE`."""
    params, state = jaxbn.batch_norm_init(SHAPE[1])

    def marked_output(x: jax.Array) -> jax.Array:
        y = eval(call, {"jaxbn": jaxbn, "x": x, "params": params, "state": state})
        return (y[0] if isinstance(y, tuple) else y)[MARKED]

    return np.asarray(jax.grad(marked_output)(jax.random.normal(jax.random.key(0), SHAPE))) != 0


def draw(path: pathlib.Path) -> None:
    # Imported here, so that `cells` can be tested without matplotlib.
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle
    from PIL import Image

    examples, channels, height, width = SHAPE
    positions, gap = height * width, 0.8
    figure, panels = plt.subplots(4, 2, figsize=(9, 7.5))
    figure.subplots_adjust(left=0.045, right=0.995, bottom=0.085, top=0.89, wspace=0.14, hspace=0.75)
    for panel, (name, call) in zip(panels.flat, CALLS.items(), strict=True):
        shared = cells(call).reshape(examples, channels, positions)
        marked = np.zeros(SHAPE, bool)
        marked[MARKED] = True
        marked = marked.reshape(shared.shape)
        for n, c, p in np.ndindex(shared.shape):
            corner = n * (positions + gap) + p, c
            colour = MARKED_COLOUR if marked[n, c, p] else SHARED_COLOUR if shared[n, c, p] else OTHER_COLOUR
            panel.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="#8C8C8C", linewidth=0.6))
            if marked[n, c, p]:
                panel.plot(corner[0] + 0.5, corner[1] + 0.5, "o", color="black", markersize=4)
        for n in range(examples):
            panel.add_patch(
                Rectangle((n * (positions + gap), 0), positions, channels, fill=False, edgecolor="black", linewidth=1)
            )
        panel.set(
            xlim=(-0.1, examples * (positions + gap) - gap + 0.1),
            ylim=(channels + 0.1, -0.1),
            xticks=[n * (positions + gap) + positions / 2 for n in range(examples)],
            xticklabels=[f"example {n}" for n in range(examples)],
            yticks=[c + 0.5 for c in range(channels)],
            yticklabels=[str(c) for c in range(channels)],
            ylabel="channel",
        )
        panel.tick_params(length=0, labelsize=8.5)
        panel.spines[:].set_visible(False)
        panel.text(0, 1.22, name, transform=panel.transAxes, fontsize=11.5, fontweight="bold", va="bottom")
        panel.text(
            0, 1.06, call.removeprefix("jaxbn."), transform=panel.transAxes, fontsize=8, family="monospace", va="bottom"
        )
    figure.legend(
        handles=[
            Patch(facecolor=MARKED_COLOUR, edgecolor="#8C8C8C", label="one value of x"),
            Patch(facecolor=SHARED_COLOUR, edgecolor="#8C8C8C", label="the values that share its statistic"),
            Patch(facecolor=OTHER_COLOUR, edgecolor="#8C8C8C", label="values that it does not depend on"),
        ],
        loc="lower center",
        ncols=3,
        frameon=False,
        fontsize=10,
    )
    figure.suptitle(
        f"The functions of jaxbn for x [N, C, H, W] = {list(SHAPE)}, the {positions} positions (H, W) side by side",
        fontsize=10.5,
        y=0.99,
    )
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=200)
    plt.close(figure)
    # The picture has few colours. With a palette the file has a third of the size.
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(__file__).with_name("norms.png")
    parser.add_argument("--out", type=pathlib.Path, default=default, help="PNG file (default: docs/norms.png)")
    out = parser.parse_args().out
    if out.suffix != ".png" or not out.parent.is_dir():
        parser.error(f"argument --out: expected a .png file in a folder that exists, got {out}")
    draw(out)


if __name__ == "__main__":
    main()

"""Images in a grid with words beside and below them: Figs. 13-14 and every other sheet."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image, ImageOps

from common.files import replacing
from evaluation.analysis import shorten

DPI = 130

SIDE, TEXT = 0.95, 0.42  # inches: an image, and the words under it


def label(text: str, width: int, lines: int) -> str:
    """Text from the data for a figure: wrapped, cut off, and with no dollar read as mathematics."""
    wrapped = textwrap.wrap(shorten(text, width * lines), width, max_lines=lines, placeholder="…")
    return "\n".join(wrapped).replace("$", r"\$")


def image_grid(
    rows: Sequence[tuple[str, Sequence[tuple[Sequence[Image.Image], str]]]],
    heads: Sequence[str] = (),
    side: float = SIDE,
) -> Figure:
    """Rows of images, all of one size, with words beside and below.

    Args:
        rows: each a label ("" for none) and its cells; a cell is some images side by side and what
            to write under them.
        heads: what to write over each column of images.
        side: of an image, in inches.
    """
    wide = max((len(images) for _, cells in rows for images, _ in cells), default=1)
    columns = max((len(cells) for _, cells in rows), default=1)
    below = TEXT if any(text for _, cells in rows for _, text in cells) else 0.08
    left = 1.45 if any(name for name, _ in rows) else 0.1
    top, step = 0.45 if heads else 0.1, wide * side + 0.14
    width, height = left + columns * step, top + len(rows) * (side + below)
    fig = Figure((width, max(height, 1)))
    ax = fig.add_axes((0, 0, 1, 1))
    pixels = (max(160, round(side * DPI)),) * 2
    for row, (name, cells) in enumerate(rows):
        y = top + row * (side + below)
        ax.text(0.08, y + side / 2, name, va="center", fontsize=8.5)
        for column, (images, text) in enumerate(cells):
            x = left + column * step
            for k, image in enumerate(images):
                place = (x + k * side, x + (k + 1) * side - 0.03, y + side - 0.03, y)
                ax.imshow(ImageOps.pad(image.convert("RGB"), pixels, color="white"), extent=place)
            words = ax.text(x, y + side, label(text, 16 * wide, 2), va="top", fontsize=7.5)
            own = Bbox.from_extents(x, y + side, x + wide * side, y + side + below)
            words.set_clip_box(TransformedBbox(own, ax.transData))  # wide letters may not fit
            words.set_clip_on(True)
    for k, head in enumerate(heads):
        x = left + k // wide * step + (k % wide + 0.5) * side
        ax.text(x, top - 0.06, head, ha="center", va="bottom", fontsize=8)
    ax.set(xlim=(0, width), ylim=(max(height, 1), 0), aspect="auto")
    ax.axis("off")
    return fig


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a prompt in a script without font
        figure.savefig(temporary, format="png", dpi=DPI)

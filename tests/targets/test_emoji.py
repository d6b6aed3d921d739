"""The emoji target: what it holds, how it is split, what its captions say."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from targets import emoji
from targets.emoji import (
    STYLES,
    captions_of,
    emoji_pixels,
    list_emoji,
    render,
    with_article,
)
from targets.images import load_target


@pytest.fixture(scope="module")
def drawings():
    return list_emoji()


def test_about_1900_concepts_in_two_styles(drawings):
    concepts = {d.code for d in drawings}
    assert 1850 <= len(concepts) <= 1950
    assert Counter(d.style for d in drawings) == pytest.approx(
        dict.fromkeys(STYLES, len(concepts)), rel=0.01
    )


def test_no_skin_tones(drawings):
    assert not [d.code for d in drawings if any(f"1F3F{digit}" in d.code for digit in "BCDEF")]


def test_validation_concepts_are_seen_in_the_other_style(drawings):
    held_out = [d for d in drawings if d.held_out]
    trained = {(d.code, d.style) for d in drawings if not d.held_out}
    assert 0.07 <= len(held_out) / len(drawings) <= 0.09
    assert all((d.code, next(s for s in STYLES if s != d.style)) in trained for d in held_out)
    assert not {(d.code, d.style) for d in held_out} & trained


def test_giraffe_captions(drawings):
    flat, outlined = (
        next(d for d in drawings if d.code == "1F992" and d.style == s) for s in STYLES
    )
    assert "a giraffe, flat emoji" in captions_of(flat)
    assert "a giraffe, outlined emoji" in captions_of(outlined)
    assert "an outlined drawing of a giraffe" in captions_of(outlined)


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("owl", "Animals & Nature", "an owl"),
        ("books", "Objects", "books"),
        ("cross", "Symbols", "a cross"),
        ("japan flag", "Flags", "the japan flag"),
        ("bus", "Travel & Places", "a bus"),
    ],
)
def test_articles(name, group, expected):
    assert with_article(name, group) == expected


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("view", ["0 0 36 36", "0 0 20 40", "-5 0 100 50"])
def test_a_drawing_fills_the_frame_whatever_its_place(tmp_path, size, view):
    svg = tmp_path / "bar.svg"
    svg.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">'
        '<rect x="3" y="10" width="12" height="6" fill="#f00"/></svg>'
    )
    ink = (255 - render(svg, size)[..., 1].astype(float)) / 255  # (rows, columns), 1 where red
    assert ink.max(0).sum() == pytest.approx(15 / 16 * size, rel=0.04)  # its width
    assert ink.max(1).sum() == pytest.approx(15 / 32 * size, rel=0.04)  # its height
    centre = (np.indices(ink.shape) * ink).sum((1, 2)) / ink.sum()
    assert centre == pytest.approx((size - 1) / 2, abs=1)


def test_both_styles_fill_the_frame():
    data = load_target("emoji", "train")
    for row in range(0, len(data), 60):
        ink = np.argwhere((data.read(row) < 250).any(2))  # (pixels, 2)
        low, high = ink.min(0), ink.max(0)
        assert low.min() >= 1 and high.max() < 63, data.captions[row]  # a rim of two, blended
        assert (high - low).max() >= 50, data.captions[row]  # white at the rim is not seen


def test_phrasing_depends_on_the_seed_alone():
    once, again, other = (load_target("emoji", "validation", seed=s).captions for s in (0, 0, 1))
    assert once == again and once != other
    assert len(load_target("emoji", "validation").groups) == len(once)


def test_rows_carry_their_style_and_group(drawings):
    data = load_target("emoji", "validation")
    held_out = [drawing for drawing in drawings if drawing.held_out]
    assert data.styles == [drawing.style for drawing in held_out]
    assert data.groups == [drawing.group for drawing in held_out]
    assert all(style in caption for style, caption in zip(data.styles, data.captions, strict=True))
    assert sorted(data.image_ids) == list(range(len(data)))


def test_other_sizes_are_rendered_when_read():
    small, large = (load_target("emoji", "train", limit=4, resolution=r) for r in (64, 256))
    assert large.images([1, 3]).shape == (2, 3, 256, 256)
    all_small = small.images(range(4))
    for row in range(4):
        shrunk = Image.fromarray(large.read(row)).resize((64, 64), Image.Resampling.BOX)
        picture = torch.from_numpy(np.array(shrunk)).permute(2, 0, 1) / 127.5 - 1
        distance = (all_small - picture).abs().mean((1, 2, 3)) * 127.5  # in grey levels
        # the frame is found to a pixel of a rendering, so parts of one off
        assert distance[row] < 8
        assert distance.argmin() == row


def test_a_damaged_cache_is_rendered_again(drawings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = drawings[:3]
    once = np.array(emoji_pixels(few))
    assert np.array_equal(once, np.stack([render(d.svg, 64) for d in few]))
    (path,) = (tmp_path / "aptp").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b""):
        path.write_bytes(damaged)
        assert np.array_equal(emoji_pixels(few), once)
        assert path.read_bytes() == whole
    monkeypatch.setattr(emoji, "render", None)  # from now on, nothing is rendered
    assert np.array_equal(emoji_pixels(few), once)

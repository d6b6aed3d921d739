"""The emoji target: what it holds, how it is split, what its captions say."""

from collections import Counter

import numpy as np
import pytest
import torch

from data import STYLES, captions_of, list_emoji, load_target, with_article
from runfolder import UserError


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


def test_images_are_drawings_on_white():
    data = load_target("emoji", "train")
    images = data.images(range(0, len(data), 100))
    assert images.shape[1:] == (3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert (images == 1).float().mean() > 0.2  # white paper
    assert images.flatten(1).std(1).min() > 0.05  # and something on it


def test_phrasing_depends_on_the_seed_alone():
    once, again, other = (load_target("emoji", "validation", seed=s).captions for s in (0, 0, 1))
    assert once == again and once != other
    assert len(load_target("emoji", "validation").groups) == len(once)


def test_limit_takes_rows_spread_over_the_target():
    everything, few = load_target("emoji", "train"), load_target("emoji", "train", limit=10)
    assert len(few) == 10 and set(few.captions) <= set(everything.captions)
    row = everything.captions.index(few.captions[7])
    assert np.array_equal(few.read(7), everything.read(row))
    assert len(set(few.groups)) > 3


def test_unknown_target():
    with pytest.raises(UserError, match=r"imagenet.*emoji"):
        load_target("imagenet", "train")

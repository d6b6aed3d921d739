"""Suites against scores by hand, with stand-ins for the networks; which rows are scored."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid_fid
from PIL import Image
from torch import Tensor, nn

from evaluation import scores
from evaluation.extractors import Extractor
from evaluation.images import to_pixels
from evaluation.scores import Embedded, Published, Reconstructed, Subset, as_row, scored_rows
from targets.images import CaptionedImages, load_target

CPU = torch.device("cpu")
WIDTHS = {
    "efficientnet-lite0": 5,
    "inception": 3,
    "inception-legacy": 4,
    "clip-vit-b-32": 2,
    "clip-vit-l-14-336": 6,
}


def pixels_of(rows: int, size: int, seed: int) -> np.ndarray:
    """Coloured noise, another mean and contrast for each row, (rows, size, size, 3)."""
    generator = np.random.default_rng(seed)
    mean, contrast = generator.uniform(60, 190, (rows, 1, 1, 3)), generator.uniform(5, 60, rows)
    noise = generator.normal(size=(rows, size, size, 3)) * contrast[:, None, None, None]
    return (mean + noise).clip(0, 255).astype(np.uint8)


def data_of(pixels: np.ndarray, styles: list[str], image_ids=None) -> CaptionedImages:
    rows = len(pixels)
    captions = ["x" * (1 + 3 * k % 7) for k in range(rows)]
    ids = np.arange(rows) if image_ids is None else np.array(image_ids)
    return CaptionedImages("noise", captions, [""] * rows, styles, ids, lambda row: pixels[row])


class ByRow:
    """Generated images."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, rows) -> Tensor:
        return torch.from_numpy(self.pixels[np.asarray(rows)]).permute(0, 3, 1, 2) / 127.5 - 1


def weights_of(name: str) -> np.ndarray:
    """A stand-in's own projection of means and deviations of colours, (6, d)."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=(6, WIDTHS[name]))


def features_of(pixels: np.ndarray, name: str, size: int | None = None) -> np.ndarray:
    """By hand: what a stand-in sees of images, through Pillow's filter where they are resized."""
    seen = []
    for image in pixels:
        picture = Image.fromarray(image)
        if size is not None:
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        x = np.asarray(picture).astype(float) / 127.5 - 1
        seen.append(np.concatenate([x.mean((0, 1)), x.std((0, 1), ddof=1)]))
    return np.array(seen) @ weights_of(name)


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[tuple[str, torch.Size]]:
    """Stand-ins instead of networks, and a cache of its own: which saw images of which shape."""
    found: list[tuple[str, torch.Size]] = []

    def load(name: str, device: torch.device) -> Extractor:
        weights = torch.from_numpy(weights_of(name)).float()

        def network(images: Tensor) -> Tensor:
            found.append((name, images.shape))
            x = to_pixels(images) / 127.5 - 1
            return torch.cat([x.mean((2, 3)), x.flatten(2).std(2)], 1) @ weights

        def read(captions: list[str]) -> Tensor:
            return torch.tensor([[1.0, len(caption) - 3.0] for caption in captions])

        return Extractor(name, device, lambda images: images, network, read)

    monkeypatch.setattr(scores, "load_extractor", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


def by_clean_fid(a: np.ndarray, b: np.ndarray) -> float:
    return pytest.approx(cleanfid_fid.fid_from_feats(a, b), rel=5e-3)


def plain_mmd(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x, y):
        squared = ((x[:, None] - y[None]) ** 2).sum(-1)
        return np.exp(-squared / (2 * sigma**2)).mean()

    return pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=2e-2)


ROWS = [7, 2, 9, 0, 4, 11, 5, 8]  # in another order than the split


def test_the_papers_scores_by_hand(calls):
    """Generated images of 300 px and real ones of 280 go through 256 px; each network has its
    score, real rows are those of the captions, and so are the texts."""
    real, made = pixels_of(12, 280, 0), pixels_of(8, 300, 1)
    data = data_of(real, [""] * 12)
    found = Published(CPU)(ByRow(made), Subset(data, ROWS))
    assert {shape[2:] for _, shape in calls if shape[0] > 1} == {(256, 256)}
    a = {name: features_of(made, name, 256) for name in WIDTHS}
    b = {name: features_of(real[ROWS], name, 256) for name in WIDTHS}
    assert set(found) == {"fid", "fid_legacy", "clip_score", "cmmd"}
    assert found["fid"].mean() == by_clean_fid(a["inception"], b["inception"])
    assert found["fid_legacy"].mean() == by_clean_fid(a["inception-legacy"], b["inception-legacy"])
    assert found["cmmd"] == plain_mmd(a["clip-vit-l-14-336"], b["clip-vit-l-14-336"], 10.0)
    texts = np.array([[1.0, len(data.captions[row]) - 3.0] for row in ROWS])
    images = a["clip-vit-b-32"]
    cosine = (
        (texts * images).sum(1) / np.linalg.norm(texts, axis=1) / np.linalg.norm(images, axis=1)
    )
    assert found["clip_score"].tolist() == pytest.approx(100 * cosine.clip(0), rel=2e-2, abs=0.2)


@pytest.mark.parametrize("styles", [["flat", "outlined"] * 6, [""] * 12])
def test_the_embedded_scores_by_hand(calls, styles):
    name, real = "efficientnet-lite0", pixels_of(12, 40, 0)
    made = (0.8 * real[ROWS] + 0.2 * pixels_of(8, 40, 1)).astype(np.uint8)
    suite, data = Embedded(CPU), data_of(real, styles)
    found = suite(ByRow(made), Subset(data, ROWS))
    a, b = features_of(made, name), features_of(real, name)
    assert found["frechet"].mean() == by_clean_fid(a, b[ROWS])
    assert found["mmd"] == plain_mmd(a, b[ROWS], 1.0)
    assert set(found) - {"frechet", "mmd"} == ({"style", "r1", "r5"} if any(styles) else set())
    if not any(styles):
        return
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    for k in (1, 5):
        expected = []
        for place, row in enumerate(ROWS):
            rivals = [j for j in range(12) if styles[j] == styles[row]]
            near = sorted(rivals, key=lambda j, place=place: -(a[place] @ b[j]))[:k]
            expected.append(float(row in near))
        assert found[f"r{k}"].tolist() == expected
    assert 0 < found["r1"].mean() < 1
    told = suite.classifier.predict(features_of(made, name))
    assert found["style"].tolist() == [
        float(told[place] == styles[row]) for place, row in enumerate(ROWS)
    ]
    exact = suite(ByRow(real[ROWS]), Subset(data, ROWS))
    assert exact["r1"].min() == 1 and exact["frechet"].mean() == pytest.approx(0, abs=1e-6)


# ---- what is computed once ----


def seen(calls: list, suite: Embedded, images, real: Subset) -> int:
    """How many images the network reads for a score."""
    del calls[:]
    suite(images, real)
    return sum(shape[0] for _, shape in calls)


def test_features_of_real_images_are_computed_once(calls):
    real, made = pixels_of(12, 40, 0), ByRow(pixels_of(8, 40, 1))
    subset = Subset(data_of(real, [""] * 12), ROWS)
    suite = Embedded(CPU)
    assert suite.features.widths == [5]
    assert seen(calls, suite, made, subset) == 8 + 8
    assert seen(calls, suite, made, subset) == 8
    again = Embedded(CPU)
    assert seen(calls, again, made, Subset(data_of(real, [""] * 12), ROWS)) == 8 + 1  # a blank
    real[ROWS[3], 0, 0, 0] ^= 255  # another picture under the same name
    assert seen(calls, suite, made, Subset(data_of(real, [""] * 12), ROWS)) == 8 + 8
    assert seen(calls, suite, made, Subset(data_of(real, [""] * 12), ROWS[::-1])) == 8 + 8


def test_so_are_those_of_the_autoencoder(calls):
    vae = nn.Linear(1, 1)
    teacher = SimpleNamespace(
        pipe=SimpleNamespace(vae=vae),
        encode_images=lambda images: images * vae.weight.item(),
        decode_latents=lambda latents: latents / vae.weight.item(),
    )
    real = Subset(data_of(pixels_of(12, 40, 0), [""] * 12), ROWS)
    suite = Embedded(CPU)
    suite(real, real)
    assert seen(calls, suite, Reconstructed(teacher, real), real) == 8
    assert seen(calls, suite, Reconstructed(teacher, real), real) == 0
    with torch.no_grad():
        vae.weight.add_(1)
    assert seen(calls, suite, Reconstructed(teacher, real), real) == 8


# ---- rows ----


@pytest.mark.parametrize("limit", [2, 5, 6, 100, None])
def test_one_caption_of_each_image_is_scored(limit):
    image_ids = [7, 7, 3, 3, 3, 9, 1, 1, 2, 9, 5]
    data = data_of(pixels_of(11, 8, 0), [""] * 11, image_ids)
    rows = scored_rows(data, "validation", limit)
    assert len(rows) == min(limit or 6, 6) and rows == sorted(rows)
    assert len(set(data.image_ids[rows])) == len(rows)
    if limit != 2:
        assert rows[0] == 0 and max(np.diff(rows)) <= 4


def test_all_of_a_split_counts_where_more_are_asked_for():
    validation, train = (load_target("emoji", split) for split in ("validation", "train"))
    assert scored_rows(validation, "validation", None) == list(range(308))
    assert scored_rows(validation, "validation", 1000) == list(range(308))
    assert len(scored_rows(train, "train", None)) == 250
    assert len(scored_rows(train, "train", 10**6)) == len(train)


def test_a_row_has_means_and_the_value_of_each_caption():
    values = {"fid": 3.0, "r1": torch.tensor([1.0, 0.5, 0.0]), "distance": torch.tensor([0.123456])}
    assert as_row(values) == {
        "fid": 3.0,
        "r1": 0.5,
        "distance": pytest.approx(0.123456),
        "captions": {"r1": [1.0, 0.5, 0.0], "distance": [0.123]},
    }

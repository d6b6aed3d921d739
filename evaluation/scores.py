"""Which scores a set of generated images gets: the embedded suite, or the paper's. App. E.3.

A suite compares generated images with the real ones of the same captions. Of real images, and of
what the autoencoder makes of them, features are computed once, by processes together, and kept on
disk under a hash of what the images are. Scores of single captions come beside those of a set, for
tests that pair captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.cache import kept_rows, rows_key
from common.files import fingerprint
from evaluation import metrics
from evaluation.extractors import extract, features_of, load_extractor
from evaluation.images import ImageRows
from evaluation.metrics import EMBEDDED_SIGMA
from targets.images import CaptionedImages, evenly_spaced
from teacher.model import Teacher

PAPER_PIXELS = 256  # both sets go through this size before any network's own (Sec. 4, Table 1)
TRAIN_IMAGES, VALIDATION_IMAGES = 250, 30_000  # scored at most if nothing else is said

Values = dict[str, float | Tensor]  # of a set of images, or of each of its captions, (n,)


def scored_rows(data: CaptionedImages, split: str, limit: int | None) -> list[int]:
    """Rows to score: one caption of each image, spread over the split (App. E.3).

    Args:
        limit: how many at most; if absent, that of the paper, and 250 of the training split.
    """
    limit = limit or (TRAIN_IMAGES if split == "train" else VALIDATION_IMAGES)
    firsts = np.sort(np.unique(data.image_ids, return_index=True)[1]).tolist()
    return [firsts[k] for k in evenly_spaced(len(firsts), limit)]


def as_row(values: Mapping[str, float | Tensor]) -> dict[str, Any]:
    """Means over captions, and under `captions` the value of each, to three digits."""
    means = {
        k: torch.as_tensor(value, dtype=torch.float64).mean().item() for k, value in values.items()
    }
    single = {
        name: [float(f"{number:.3g}") for number in value.tolist()]
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return means | {"captions": single}


@dataclass(frozen=True)
class Subset:
    """Some rows of a split, read when asked for."""

    data: CaptionedImages
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        return self.data.images([self.rows[int(position)] for position in positions])

    @cached_property
    def whole(self) -> Subset:
        """All rows of the split."""
        return Subset(self.data, range(len(self.data)))

    @cached_property
    def key(self) -> str:
        """A hash of what the images are: their names, their files' states, their size."""
        stamps = self.data.take(list(self.rows)).stamps()
        size = str(self.images([0]).shape)
        return rows_key(size, lines=(text for stamp in stamps for text in stamp))


@dataclass(frozen=True)
class Reconstructed:
    """Real images encoded and decoded by the teacher's autoencoder: the best it can generate."""

    teacher: Teacher
    real: Subset

    def __len__(self) -> int:
        return len(self.real)

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        latents = self.teacher.encode_images(self.real.images(positions))
        return self.teacher.decode_latents(latents).float().cpu()

    @cached_property
    def key(self) -> str:
        """A hash of what the real images are, and of the autoencoder."""
        return f"{self.real.key}-{fingerprint(self.teacher.pipe.vae.state_dict(), {})}"


class Features:
    """Features of images by several extractors, in one pass over the images.

    Args:
        pixels: a size that all images go through, if given.
    """

    def __init__(self, names: Sequence[str], device: torch.device, pixels: int | None) -> None:
        self.extractors = {name: load_extractor(name, device) for name in names}
        self.pixels = pixels

    @cached_property
    def widths(self) -> list[int]:
        blank = torch.zeros(1, 3, 32, 32)
        return [extractor(blank).shape[1] for extractor in self.extractors.values()]

    def __call__(self, images: ImageRows | Subset | Reconstructed) -> dict[str, Tensor]:
        """Extractor -> features, (n, d); those of real images from the cache, or into it."""
        extractors = list(self.extractors.values())
        if isinstance(images, Subset | Reconstructed):
            parts = kept_rows(
                f"features-{rows_key(str(self.pixels), images.key, lines=self.extractors)}",
                len(images),
                lambda batches: features_of(extractors, images.images, batches, self.pixels),
                part=4096,
                batch=64,
                what="features of real images",
            )
            features = torch.cat(parts)
        else:
            features = extract(extractors, images, pixels=self.pixels)
        return dict(zip(self.extractors, features.split(self.widths, 1), strict=True))


class Embedded:
    """Scores in the features of an extractor that comes with a package."""

    pixels = None

    def __init__(self, device: torch.device) -> None:
        self.features = Features(("efficientnet-lite0",), device, self.pixels)
        self.classifier: Any = None  # of styles, fitted to the first split: the training images

    def compared_with(self, real: Subset) -> Subset:
        """The real images whose features are needed: all of the split where it has styles."""
        return real.whole if any(real.data.styles) else real

    def __call__(self, images: ImageRows, real: Subset) -> Values:
        """Frechet distance and MMD to the captions' own images, R-precision, style.

        The last two only where the target has styles: whether the caption's own image is the
        nearest of its style, or among the nearest five, and whether a classifier sees that style.
        """
        name, styles = "efficientnet-lite0", real.data.styles
        features, by_style = self.features(images)[name], any(styles)
        gallery = self.features(self.compared_with(real))[name]
        reference = gallery[list(real.rows)] if by_style else gallery
        found: Values = {
            "frechet": metrics.frechet_values(features, reference),
            "mmd": metrics.mmd(metrics.unit(features), metrics.unit(reference), EMBEDDED_SIGMA),
        }
        if by_style:
            if self.classifier is None:
                self.classifier = metrics.style_classifier(gallery, styles)
            own = [styles[row] for row in real.rows]
            found["style"] = metrics.style_hits(self.classifier, features, own)
            truth = torch.tensor(real.rows)
            for k in (1, 5):
                found[f"r{k}"] = metrics.r_precision(features, gallery, truth, k, (own, styles))
        return found


class Published:
    """The paper's scores: FID in both of clean-fid's modes, CLIP score and CMMD (App. E.3)."""

    pixels = PAPER_PIXELS

    def __init__(self, device: torch.device) -> None:
        names = ("inception", "inception-legacy", "clip-vit-b-32", "clip-vit-l-14-336")
        self.features = Features(names, device, self.pixels)

    def compared_with(self, real: Subset) -> Subset:
        """The real images whose features are needed."""
        return real

    def __call__(self, images: ImageRows, real: Subset) -> Values:
        """Scores of the images of the captions whose own images are `real`."""
        a, b = self.features(images), self.features(real)
        captions = [real.data.captions[row] for row in real.rows]
        texts = self.features.extractors["clip-vit-b-32"].texts(captions)
        large = metrics.unit(a["clip-vit-l-14-336"]), metrics.unit(b["clip-vit-l-14-336"])
        return {
            "fid": metrics.frechet_values(a["inception"], b["inception"]),
            "fid_legacy": metrics.frechet_values(a["inception-legacy"], b["inception-legacy"]),
            "clip_score": metrics.clip_scores(a["clip-vit-b-32"], texts),
            "cmmd": metrics.mmd(*large),
        }


SUITES: dict[str, Callable[[torch.device], Embedded | Published]] = {
    "embedded": Embedded,
    "paper": Published,
}


def shared_information(
    data: CaptionedImages, experts: list[int], split: str
) -> list[dict[str, Any]]:
    """Mutual information of experts with groups and with styles, where a target has them.

    Each beside the same after a shuffle, as a control.
    """
    return [
        {
            "split": split,
            "label": label,
            "prompts": len(experts),
            "nmi": metrics.nmi(experts, labels),
            "shuffled": metrics.shuffled_nmi(experts, labels),
        }
        for label, labels in (("group", data.groups), ("style", data.styles))
        if any(labels)
    ]

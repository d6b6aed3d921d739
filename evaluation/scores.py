"""Which scores a set of generated images gets: the embedded suite, or the paper's. App. E.3."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.cache import kept_rows, rows_key
from evaluation import metrics
from evaluation.features import ImageRows, extract, load_extractor
from evaluation.metrics import EMBEDDED_SIGMA
from targets.images import CaptionedImages, evenly_spaced
from teacher.model import Teacher


@dataclass(frozen=True)
class Subset:
    """Some rows of a target's split, read when asked for."""

    data: CaptionedImages
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        return self.data.images([self.rows[int(position)] for position in positions])


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


class Embedded:
    """Scores in the features of an extractor that comes with a package."""

    def __init__(self, device: torch.device) -> None:
        self.extractor = load_extractor("efficientnet-lite0", device)
        self.classifier: Any = None  # of styles, fitted to the first split: the training images

    def gallery(self, data: CaptionedImages) -> Tensor:
        """Features of all real images of a split, (rows, d), from the cache or into it."""
        some = data.images(evenly_spaced(len(data), 8))
        pixels = hashlib.sha256(some.numpy().tobytes()).hexdigest()
        parts = kept_rows(
            f"features-{rows_key(self.extractor.name, pixels, lines=data.captions)}",
            len(data),
            lambda batches: (self.extractor(data.images(rows)) for rows in batches),
            part=4096,
            batch=64,
            what="features of real images",
        )
        return torch.cat(parts)

    def __call__(self, images: Tensor | ImageRows, real: Subset) -> dict[str, float]:
        """Frechet distance and MMD to the captions' own images, R-precision, style.

        The last two only where the target has styles: whether the caption's own image is the
        nearest of its style, or among the nearest five, and whether a classifier sees that style.
        """
        styles = real.data.styles
        features = extract(self.extractor, images)
        gallery = self.gallery(real.data) if any(styles) else torch.empty(0)
        reference = gallery[real.rows] if any(styles) else extract(self.extractor, real)
        found = {
            "frechet": metrics.frechet_distance(features, reference),
            "mmd": metrics.mmd(metrics.unit(features), metrics.unit(reference), EMBEDDED_SIGMA),
        }
        if any(styles):
            if self.classifier is None:
                self.classifier = metrics.style_classifier(gallery, styles)
            pools = [styles[row] for row in real.rows], styles
            found["style"] = metrics.style_accuracy(self.classifier, features, pools[0])
            for k in (1, 5):
                truth = torch.tensor(real.rows)
                found[f"r{k}"] = metrics.r_precision(features, gallery, truth, k, pools)
        return found


class Published:
    """The paper's scores: FID in both of clean-fid's modes, CLIP score and CMMD (App. E.3)."""

    def __init__(self, device: torch.device) -> None:
        names = ("inception", "inception-legacy", "clip-vit-b-32", "clip-vit-l-14-336")
        self.extractors = {name: load_extractor(name, device) for name in names}

    def __call__(self, images: ImageRows, real: Subset) -> dict[str, float]:
        """Scores of the images of the captions whose own images are `real`."""
        clean, legacy, clip, large = self.extractors.values()
        captions = [real.data.captions[row] for row in real.rows]
        return {
            "fid": metrics.fid(real, images, extractor=clean),
            "fid_legacy": metrics.fid(real, images, extractor=legacy),
            "clip_score": metrics.clip_score(images, captions, clip),
            "cmmd": metrics.cmmd(real, images, large),
        }


SUITES: dict[str, Callable[[torch.device], Embedded | Published]] = {
    "embedded": Embedded,
    "paper": Published,
}


def in_common(data: CaptionedImages, experts: list[int], split: str) -> list[dict[str, Any]]:
    """What experts have in common with groups and styles, where a target has them.

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

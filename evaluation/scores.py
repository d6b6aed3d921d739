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
from evaluation.features import Rows, extract, load_extractor
from evaluation.metrics import EMBEDDED_SIGMA
from targets.images import CaptionedImages, spread
from teacher.model import Teacher

# ---- scoring ----


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
    """Pictures after a way through the teacher's autoencoder: the best that it can draw."""

    teacher: Teacher
    pictures: Subset

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        latents = self.teacher.encode_images(self.pictures.images(positions))
        return self.teacher.decode_latents(latents).float().cpu()


def readable(data: CaptionedImages, rows: list[int]) -> list[int]:
    """The rows, or, for those whose image cannot be decoded, the next that can; each one once."""
    batches = data.batches([rows[start : start + 64] for start in range(0, len(rows), 64)])
    return sorted({row for _, used in batches for row in used.tolist()})


class Embedded:
    """Scores in the features of an extractor that comes with a package."""

    def __init__(self, device: torch.device) -> None:
        self.extractor = load_extractor("efficientnet-lite0", device)
        self.classifier: Any = None  # of styles, fitted to the first split: the training pictures

    def gallery(self, data: CaptionedImages) -> Tensor:
        """Features of all real pictures of a split, (rows, d), from the cache or into it."""
        pixels = hashlib.sha256(data.images(spread(len(data), 8)).numpy().tobytes()).hexdigest()
        parts = kept_rows(
            f"features-{rows_key(self.extractor.name, pixels, lines=data.captions)}",
            len(data),
            lambda batches: (self.extractor(data.images(rows)) for rows in batches),
            part=4096,
            batch=64,
            what="features of real pictures",
        )
        return torch.cat(parts)

    def __call__(self, pictures: Tensor | Rows, real: Subset) -> dict[str, float]:
        """Frechet distance and MMD to the captions' own pictures, R-precision, style.

        The last two where the target has styles: is the caption's picture the nearest of its style,
        or among the nearest five, and would one say that it has that style?
        """
        styles = real.data.styles
        features = extract(self.extractor, pictures)
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

    def __call__(self, pictures: Rows, real: Subset) -> dict[str, float]:
        """Scores of the pictures of the captions whose own pictures are `real`."""
        clean, legacy, clip, large = self.extractors.values()
        captions = [real.data.captions[row] for row in real.rows]
        return {
            "fid": metrics.fid(real, pictures, extractor=clean),
            "fid_legacy": metrics.fid(real, pictures, extractor=legacy),
            "clip_score": metrics.clip_score(pictures, captions, clip),
            "cmmd": metrics.cmmd(real, pictures, large),
        }


SUITES: dict[str, Callable[[torch.device], Embedded | Published]] = {
    "embedded": Embedded,
    "paper": Published,
}


def in_common(captions: CaptionedImages, experts: list[int], split: str) -> dict[str, Any]:
    """How much expert and group have in common, beside a shuffled control."""
    found: dict[str, Any] = {"split": split, "prompts": len(experts)}
    found["nmi"] = metrics.nmi(experts, captions.groups)
    found["shuffled"] = metrics.shuffled_nmi(experts, captions.groups)
    return found

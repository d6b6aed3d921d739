"""How good images are: the metrics of Sec. 4 and App. E.3, and stand-ins that need no download.

| function | what it measures | source |
|---|---|---|
| `frechet_values` | FID, of Inception's features | Heusel et al. 2017 |
| `mmd` | CMMD, of CLIP's features, scaled to length 1 | Jayasumana et al. 2024 |
| `clip_scores` | whether an image shows its caption | Hessel et al. 2021 |
| `pick_scores` | what people would prefer | Kirstain et al. 2023 |
| `r_precision` | whether an image looks like its caption's own image | Xu et al. 2018 |
| `nmi`, `shuffled_nmi` | what two labelings share, and the same by chance | scikit-learn |
| `style_classifier` | which style an image has | - |

All are given features (`extractors.py`). The first two are distances of sets, generated from real;
the next three have a value for each sample. Distances grow as sets shrink, so compare sets of the
same sizes only: in EfficientNet-Lite0's features the Frechet distance of 1,744 real emoji from
1,744 others is 86, of 500 from 500 it is 245, of 154 from 154 it is 453 (of 154 images by the
pocket teacher from the real ones 796).

Where the paper's extractors cannot be had, `efficientnet-lite0` stands in, and a distance is no FID
or CMMD; R-precision takes the place of the CLIP score. It compares images with images, and by
cosine: 85 of 100 emoji were found again after the pocket teacher's autoencoder, 82 by Euclidean
distance. CMMD's bandwidth, 10 for vectors of length 1, makes its kernel all but linear: it compares
means. `EMBEDDED_SIGMA` is about the distance between two emoji (the median is 1.17), so that the
MMD of the embedded features sees more than means.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.randomness import step_generator

EMBEDDED_SIGMA = 1.0  # bandwidth of `mmd` for unit-length EfficientNet features; see the header

CHUNK = 2048  # rows of a distance matrix at once

TIED = 1e-6  # cosines closer than this are equal: single precision, other batches


# ---- distances of two sets of features ----


def two_sets(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, d) and (m, d) as float64 on the CPU.

    Raises:
        ValueError: their shapes do not fit, or a number is not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"features must be (n, d) and (m, d), got {a.shape} and {b.shape}")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite")
    return a, b


def frechet_values(a: Tensor, b: Tensor) -> Tensor:
    """The Frechet distance as a mean over pairs: what each row of a and b adds to it, (n,).

    Their mean is |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), Heusel et al. 2017.
    With S = X^T X the last trace is the sum of the singular values of M = X_a X_b^T = U s V^T, so
    it needs no square root of a matrix, and no more samples than dimensions.

    A pair's value is the distance plus its influence, n times the derivative by the pair's weight
    (the infinitesimal jackknife), so resampling pairs' values is resampling pairs to first order.
    With weights w, M_ij ~ sqrt(w_i w_j), so that of the singular values' sum is
    ((U s U^T)_ii + (V s V^T)_ii) / 2.

    Args:
        a, b: features (n, d) of pairs, such as images of the same captions, at least two.

    Raises:
        ValueError: the shapes do not fit, there is one pair only, or a number is not finite.
    """
    a, b = two_sets(a, b)
    if len(a) != len(b):
        raise ValueError(f"pairs need sets of one size, got {len(a)} and {len(b)}")
    (X_a, Q_a, R_a), (X_b, Q_b, R_b) = centred(a), centred(b)
    u, s, vh = torch.linalg.svd(R_a @ R_b.T, full_matrices=False)
    norm = ((Q_a @ u).square() + (Q_b @ vh.T).square()) @ s  # (n,)
    spread = X_a.square().sum(1) + X_b.square().sum(1) - norm  # (n,)
    mean = a.mean(0) - b.mean(0)
    return (2 * (a - b) - mean) @ mean + len(a) * spread


def centred(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X with X^T X the sample covariance (divisor n - 1) of (n, d), and X = Q R.

    Raises:
        ValueError: there is one row only.
    """
    n = len(features)
    if n < 2:
        raise ValueError(f"a covariance needs two rows or more, got {n}")
    X = (features - features.mean(0)) / math.sqrt(n - 1)
    Q, R = torch.linalg.qr(X)
    return X, Q, R


def mean_kernel(a: Tensor, b: Tensor, sigma: float) -> float:
    """Mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs of rows x of a and y of b."""
    total = 0.0
    for part in a.split(CHUNK):
        squared = torch.cdist(part, b).square()  # (chunk, m)
        total += torch.exp(-squared / (2 * sigma**2)).sum().item()
    return total / (len(a) * len(b))


def mmd(a: Tensor, b: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared maximum mean discrepancy in a Gaussian kernel, times `scale`: Jayasumana et al. 2024.

    The estimator that CMMD publishes: pairs of a row with itself count (a V-statistic), so it is
    never negative, and exactly 0 for equal sets. It raises the value by up to scale (1/n + 1/m).

    Args:
        a, b: features (n, d) and (m, d); of length 1 in CMMD (see `unit`).
        sigma: the kernel's bandwidth, > 0; CMMD's is 10.
        scale: CMMD's is 1000.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """
    a, b = two_sets(a, b)
    squared = mean_kernel(a, a, sigma) + mean_kernel(b, b, sigma) - 2 * mean_kernel(a, b, sigma)
    return scale * max(0.0, squared)  # rounding


def unit(features: Tensor) -> Tensor:
    """Rows scaled to length 1, (n, d)."""
    return F.normalize(features, dim=1)


# ---- scores of single samples ----


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of a and the same row of b, (n, d) each -> (n,)."""
    return (unit(a) * unit(b)).sum(1)


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """100 max(0, cosine of image and caption), Hessel et al. 2021, without their w = 2.5.

    Args:
        images, captions: features by the same CLIP, (n, d) each; the paper's is `clip-vit-b-32`.
    """
    return 100 * cosines(images, captions).clamp(min=0)


def pick_scores(images: Tensor, captions: Tensor, scale: float) -> Tensor:
    """`pickscore`'s learned scale times the cosine of image and prompt, Kirstain et al. 2023."""
    return scale * cosines(images, captions)


def r_precision(
    features: Tensor,
    gallery: Tensor,
    truth: Tensor,
    k: int = 1,
    pools: tuple[Sequence[Hashable], Sequence[Hashable]] | None = None,
) -> Tensor:
    """Of each sample, whether its own real image is among the k nearest by cosine, 0 or 1, (n,).

    R-precision@k is the mean, after Xu et al. 2018, who rank captions. Where other images are
    exactly as near as the own one (some flags look the same), a sample counts by the probability
    that the own image is among the first k when equally near images are put in a random order.

    Args:
        features: of the samples, (n, d).
        gallery: of the real images, (m, d).
        truth: row of each sample's own image in the gallery, (n,), int64.
        k: at least 1.
        pools: labels of the samples (n) and of the gallery (m), such as the style; a sample is
            compared with real images of its own label only.

    Raises:
        ValueError: shapes or k do not fit, or an own image has another label than its sample.
    """
    features, gallery = two_sets(features, gallery)
    if k < 1 or truth.shape != features.shape[:1]:
        raise ValueError(f"k must be >= 1 and truth one row a sample, got {k}, {truth.shape}")
    samples_pool, gallery_pool = pools or ([0] * len(features), [0] * len(gallery))
    if len(samples_pool) != len(features) or len(gallery_pool) != len(gallery):
        raise ValueError(f"{len(samples_pool)} and {len(gallery_pool)} labels do not fit")
    number = {label: i for i, label in enumerate(dict.fromkeys([*samples_pool, *gallery_pool]))}
    sample_labels = torch.tensor([number[label] for label in samples_pool])  # (n,)
    gallery_labels = torch.tensor([number[label] for label in gallery_pool])  # (m,)
    if not torch.equal(sample_labels, gallery_labels[truth]):
        raise ValueError("a sample's own image has another label than the sample")
    gallery, hits = unit(gallery), []
    for rows in torch.arange(len(features)).split(CHUNK):
        cosine = unit(features[rows]) @ gallery.T  # (chunk, m)
        own = cosine.gather(1, truth[rows, None])  # (chunk, 1)
        rivals = sample_labels[rows, None] == gallery_labels
        nearer = (rivals & (cosine > own + TIED)).sum(1)  # (chunk,)
        tied = (rivals & ((cosine - own).abs() <= TIED)).sum(1)  # at least 1: the own image
        hits.append(((k - nearer) / tied).clamp(0, 1))
    return torch.cat(hits)


# ---- labels ----


def nmi(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Normalised mutual information of two labelings, in [0, 1] (arithmetic mean of entropies)."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(list(a), list(b)))


def shuffled_nmi(
    a: Sequence[Hashable], b: Sequence[Hashable], seed: int = 0, repeats: int = 20
) -> float:
    """The mean of `nmi` over `repeats` shuffles of b: the level expected by chance."""
    total = 0.0
    for step in range(repeats):
        order = torch.randperm(len(b), generator=step_generator(seed, "shuffled nmi", step))
        total += nmi(a, [b[i] for i in order.tolist()])
    return total / repeats


def style_classifier(features: Tensor, labels: Sequence[str]) -> Any:
    """A logistic regression from standardised features (n, d) to `labels` (n).

    Returns a scikit-learn pipeline with `predict`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(features.numpy(), list(labels))


def style_hits(classifier: Any, features: Tensor, labels: Sequence[str]) -> Tensor:
    """Of each of the features (n, d), whether a `style_classifier` gives it its label, (n,)."""
    predicted = classifier.predict(features.numpy())
    return torch.tensor([float(a == b) for a, b in zip(predicted, labels, strict=True)])

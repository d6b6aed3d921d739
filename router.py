"""The prompt router: Sec. 3.2 and App. D.1-D.2, Eqs. 2-4, 8, 20-22.

A prompt becomes an embedding z (a frozen sentence encoder), an architecture embedding e (one linear
layer), and then one of N architecture codes: by optimal transport while training, by cosine
similarity afterwards.

| symbol | name here | shape |
|---|---|---|
| p | `prompts` | B strings |
| z | `z`, prompt embeddings | (B, dz) |
| e, E | `e`, architecture embeddings, one in each row (in the paper's E: column) | (B, D) |
| A | `router.codes`, one in each row (in the paper's A: column) | (N, D) |
| Q* | the result of `sinkhorn` | (N, B) |
| I | `experts`, the number of each prompt's code | (B,) |
| eta | `router.predictor`: weight W and bias b | (D, dz), (D,) |

Not in the paper: C is `router.content`, (dz, dz), what an image's captions have in common; mean z
is `router.mean_z`, (dz,); `router.keys`, (N, D), are the codes' starting values less b; prompts are
compared with them. Why, and what else differs from the paper: docs/departures.md#router.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cache import mapped_rows, rows_key
from common.hub import (
    MAX_PROMPT_CHARACTERS,
    PROMPT_ENCODERS,
    content_hash,
    encoder_folder,
    lasting_name,
    load_sentence_transformer,
)
from common.randomness import step_generator
from sinkhorn import sinkhorn

PART = 16_384  # captions in one file of the cache: 50 MB where dz is 768


class PromptEncoder:
    """A frozen Sentence Transformer.

    `name`: `minilm`, a folder, or a hub id. Raises `UserError` where it cannot be loaded.
    """

    def __init__(self, name: str = "minilm", device: torch.device | str = "cpu") -> None:
        self.folder = encoder_folder(name)
        self.name = name if name in PROMPT_ENCODERS else lasting_name(name)
        self.model = load_sentence_transformer(self.folder, name, device)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that an embedding depends on beside the prompt."""
        return rows_key(content_hash(self.folder), str(MAX_PROMPT_CHARACTERS))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """z = f_PE(p): unit-length embeddings, (B, dz), float32, on the CPU [Eq. 3]"""
        z = self.model.encode(
            [prompt[:MAX_PROMPT_CHARACTERS] for prompt in prompts],
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return F.normalize(z.detach().clone().float().cpu(), dim=-1)

    def embeddings(self, captions: Sequence[str]) -> Tensor:
        """z of captions, (rows, dz): mapped from the cache, or computed into it first."""
        key = rows_key(self.fingerprint, lines=captions)
        return mapped_rows(
            f"embeddings-{key}",
            len(captions),
            lambda batches: (self([captions[row] for row in rows.tolist()]) for rows in batches),
            part=PART,
            batch=512,
            what="embedding captions",
        )


def content_map(z: Tensor, images: Tensor, ridge: float = 0.1) -> Tensor:
    """The linear map from a caption to what its image's captions have in common, (dz, dz).

    A linear regression: from the embedding of one caption it predicts the mean embedding of all
    captions of the same image. The ridge pulls C towards the identity, which it is where each image
    has one caption. C is scaled so that embeddings keep their mean length.

    Args:
        z: embeddings of captions, (P, dz).
        images: number of the image of each caption, (P,).
        ridge: weight of the identity, as a share of the embeddings' mean variance.
    """
    images = images.unique(return_inverse=True)[1]  # (P,), renumbered from 0 without gaps
    centred = (z - z.mean(0)).double()  # (P, dz)
    if centred.norm() < 1e-6 * len(z):  # all captions are the same: there is nothing to learn
        return torch.eye(z.shape[1]).to(z)
    mean = torch.zeros(int(images.max()) + 1, z.shape[1], dtype=torch.float64)
    mean.index_add_(0, images, centred)
    common = (mean / torch.bincount(images)[:, None])[images]  # (P, dz), mean of the same image
    # (dz, dz) each; centred.T @ common is the same as common.T @ common
    total, between = centred.T @ centred, common.T @ common
    weight = ridge * total.trace() / len(total) * torch.eye(len(total), dtype=torch.float64)
    C = torch.linalg.solve(total + weight, between + weight).T  # (dz, dz)
    return (C * centred.norm(dim=1).mean() / (centred @ C.T).norm(dim=1).mean()).to(z)


class PromptRouter(nn.Module):
    """Architecture predictor, architecture codes, and the two ways of routing.

    Args:
        prompt_dim: dz, width of the prompt embeddings.
        num_units: D, units of the architecture space.
        num_experts: N.
        center: compare centred vectors; raw ones, exactly as printed, otherwise.
        own_keys: compare with keys, which stay where the codes start; with the codes as they are
            trained, exactly as printed, otherwise.
        open_logit: the logit that every unit starts at, until `start` sets others.
    """

    mean_z: Tensor
    content: Tensor
    keys: Tensor

    def __init__(
        self,
        prompt_dim: int,
        num_units: int,
        num_experts: int,
        *,
        center: bool = True,
        own_keys: bool = True,
        open_logit: float = 2.0,
    ) -> None:
        super().__init__()
        self.center, self.own_keys = center, own_keys
        self.predictor = nn.Linear(prompt_dim, num_units)
        nn.init.constant_(self.predictor.bias, open_logit)
        self.codes = nn.Parameter(torch.full((num_experts, num_units), open_logit))  # A, (N, D)
        self.register_buffer("mean_z", torch.zeros(prompt_dim))
        self.register_buffer("content", torch.eye(prompt_dim))
        self.register_buffer("keys", torch.zeros(num_experts, num_units))  # less b

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    def forward(self, z: Tensor) -> Tensor:
        """e = f_AP(z; eta): prompt embeddings (B, dz) -> architecture embeddings (B, D) [Eq. 4]"""
        return self.predictor((z - self.mean_z) @ self.content.T)

    @torch.no_grad()
    def start(self, logits: Tensor, weight: Tensor) -> None:
        """Set b and every code to `logits`, (D,), and W to `weight`, (D, dz)."""
        self.predictor.bias.copy_(logits)
        self.predictor.weight.copy_(weight)
        self.codes.copy_(logits.expand_as(self.codes))

    @torch.no_grad()
    def shift(self, amount: float | Tensor) -> None:
        """Add one number to all D logits of every e and every code; routing stays as it is."""
        self.predictor.bias.add_(amount)
        self.codes.add_(amount)

    @torch.no_grad()
    def similarity(self, e: Tensor, codes: Tensor | None = None) -> Tensor:
        """Cosine similarity of each code with each embedding, (B, D) -> (N, B).

        Embeddings, codes and keys are taken relative to b, which moves; so keys that were made from
        an earlier b go on fitting.

        Args:
            codes: what to compare with, less b, (N, D); if absent, the keys or, without keys, the
                codes.
        """
        b = self.predictor.bias
        A = codes if codes is not None else self.keys if self.own_keys else self.codes - b  # (N, D)
        e = e - b  # (B, D)
        if self.center:
            A = A - A.mean(0)
        else:
            A, e = A + b, e + b
        return F.normalize(A, dim=-1) @ F.normalize(e, dim=-1).T  # (N, B)

    def transport_assignment(self, e: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
        """I = argmax over codes of B Q*: experts of a training batch, (B, D) -> (B,) [Eq. 20]"""
        return sinkhorn(self.similarity(e), eps, iterations).argmax(0)

    def assign(
        self, e: Tensor, *, eps: float = 0.05, iterations: int = 3, transport: bool = True
    ) -> Tensor:
        """The experts of a training batch, (B, D) -> (B,), without gradient.

        Args:
            e: architecture embeddings, (B, D).
            eps, iterations: of the transport.
            transport: without it each prompt takes its nearest code (the ablation of Table 3).
        """
        return self.transport_assignment(e, eps, iterations) if transport else self.nearest(e)

    def codes_of(self, experts: Tensor) -> Tensor:
        """f_R(e, A; Q*) = A[:, I]: the code of each prompt, (B,) -> (B, D) [Eq. 8] [Eq. 21]"""
        return self.codes[experts]

    def nearest(self, e: Tensor) -> Tensor:
        """The expert of the highest cosine similarity, (B, D) -> (B,) [Eq. 22]

        A prompt's expert does not depend on the other prompts.
        """
        return self.similarity(e).argmax(0)

    @torch.no_grad()
    def route(
        self, prompts: Sequence[str] | Tensor, encoder: PromptEncoder | None = None
    ) -> Tensor:
        """a = f_PR(p; eta, A): test-time experts of prompts, (B,), as numbers of codes [Eq. 2]

        Args:
            prompts: B prompts, or their embeddings z, (B, dz).
            encoder: what turns text into z; needed for text only.
        """
        if not isinstance(prompts, Tensor):
            if encoder is None:
                raise ValueError("routing text needs an encoder")
            prompts = encoder(prompts)
        return self.nearest(self(prompts.to(self.codes.device)))

    @torch.no_grad()
    def start_codes(
        self,
        z: Tensor,
        *,
        seed: int = 0,
        iterations: int = 50,
        sample: int = 8192,
        transport: bool = True,
        clusters: Tensor | None = None,
    ) -> None:
        """Set the codes to the centres of a balanced clustering of the prompts' embeddings.

        Lloyd's iterations in which the transport of Eq. 5 does the assigning, so that no cluster
        runs empty.

        Args:
            z: embeddings of training prompts, (P, dz), at least N.
            seed: chooses the first centres and, of more than `sample` prompts, which are used.
            iterations: of assigning and averaging.
            transport: without it the clustering is k-means, and clusters have any size.
            clusters: of the prompts, (P,), instead of a clustering.
        """
        rows = torch.randperm(len(z), generator=step_generator(seed, "codes"))[:sample]
        e, b = self(z[rows].to(self.codes.device)), self.predictor.bias  # (P, D), (D,)
        centres = e[: self.num_experts].clone()  # (N, D)
        for _ in range(iterations if clusters is None else 1):
            if clusters is None:
                scores = self.similarity(e, centres - b)  # (N, P)
                scores = sinkhorn(scores, iterations=10) if transport else scores
                experts = scores.argmax(0)  # (P,)
            else:
                experts = clusters[rows].to(e.device)  # (P,)
            for i in experts.unique().tolist():
                centres[i] = e[experts == i].mean(0)
        self.codes.copy_(centres)
        self.keys.copy_(centres - b)

    def settings(self) -> dict[str, Any]:
        """What `PromptRouter(**settings)` needs to make an empty router of this shape."""
        units, prompt_dim = self.predictor.weight.shape
        return {
            "prompt_dim": prompt_dim,
            "num_units": units,
            "num_experts": self.num_experts,
            "center": self.center,
            "own_keys": self.own_keys,
        }

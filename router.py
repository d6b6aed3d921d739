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

Not in the paper, and explained below: delta is `router.own`, (N, D); C is `router.content`,
(dz, dz); mean z is `router.mean_z`, (dz,), over the training prompts; `router.keys` are (N, D).

Departures from the paper, each with a switch (`settings.py`):
- A code is a shared part plus its own difference, a_i = b + delta_i, and an embedding is
  e = W C (z - mean z) + b with the same b, the predictor's bias. So what all prompts need is
  learned from all of them, in both phases, and the few samples of a code have to learn only how it
  differs. `shared=False` trains N separate codes.
- The predictor reads C (z - mean z): C keeps what an image's captions have in common and removes
  what their wording adds (`content_map`), so that "a giraffe" and "a flat emoji of a giraffe" are
  routed alike. It is measured once and frozen. With plain z the router sorts by wording. Of 308
  validation names, 33 % share an expert with their flat or outlined form without C, 85 % with it.
- Similarities (Eqs. 7 and 22) are cosines of *centred* vectors, e - b = W C (z - mean z) and
  a_i - mean a. All e and a share the large part b; raw cosines are all near one, and test-time
  routing collapses onto a few experts. `center=False` compares raw vectors, exactly as printed.
- Eqs. 7 and 22 compare embeddings with *keys*: copies of the codes as they start, before training
  moves them. Eq. 15 moves codes by image losses alone and embeddings by the contrastive loss alone;
  nothing pulls a code back to its prompts. `own_keys=False` compares with the codes as trained,
  exactly as printed.
- Eq. 7 uses A^T E; the cosine is used there too, so that eps = 0.05 means the same for every D and
  training routes like Eq. 22.
- Codes start as the centres of a balanced clustering of the training prompts' embeddings, made with
  the same transport (`start_codes`). The paper says only that the codes start after the warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.cache import kept_rows, rows_key
from common.hub import (
    PROMPT_ENCODERS,
    content_hash,
    encoder_folder,
    lasting_name,
    load_sentence_transformer,
)
from common.randomness import step_generator
from sinkhorn import sinkhorn

MAX_PROMPT_CHARACTERS = 10_000

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
    def identity(self) -> str:
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
        """z of a target's captions, (rows, dz): from the cache, or computed into it."""
        key = rows_key(self.identity, lines=captions)
        parts = kept_rows(
            f"embeddings-{key}",
            len(captions),
            lambda batches: (self([captions[row] for row in rows.tolist()]) for rows in batches),
            part=PART,
            batch=512,
            what="embedding captions",
        )
        return torch.cat(parts)


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
        center: compare centred vectors; see the module's header.
        shared: codes are b plus a difference of their own; see the module's header.
        own_keys: route by keys that stay where the codes start; see the module's header.
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
        shared: bool = True,
        own_keys: bool = True,
        open_logit: float = 2.0,
    ) -> None:
        super().__init__()
        self.center, self.shared, self.own_keys = center, shared, own_keys
        self.predictor = nn.Linear(prompt_dim, num_units)
        nn.init.constant_(self.predictor.bias, open_logit)
        own = torch.full((num_experts, num_units), 0.0 if shared else open_logit)  # (N, D)
        # a single code is b alone: its own part stays 0
        self.own = nn.Parameter(own, requires_grad=num_experts > 1 or not shared)
        self.register_buffer("mean_z", torch.zeros(prompt_dim))
        self.register_buffer("content", torch.eye(prompt_dim))
        self.register_buffer("keys", torch.zeros(num_experts, num_units))

    @property
    def num_experts(self) -> int:
        return self.own.shape[0]

    @property
    def codes(self) -> Tensor:
        """A, the architecture codes, (N, D)."""
        return self.own + self.predictor.bias if self.shared else self.own

    def forward(self, z: Tensor) -> Tensor:
        """e = f_AP(z; eta): prompt embeddings (B, dz) -> architecture embeddings (B, D) [Eq. 4]"""
        return self.predictor((z - self.mean_z) @ self.content.T)

    @torch.no_grad()
    def start(self, logits: Tensor, weight: Tensor | None = None) -> None:
        """Set b, and with it every code, to `logits`, (D,), and W to `weight`, (D, dz)."""
        self.predictor.bias.copy_(logits)
        if weight is not None:
            self.predictor.weight.copy_(weight)
        self.own.copy_(torch.zeros_like(self.own) if self.shared else logits.expand_as(self.own))

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add one number to all D logits of every e and every code."""
        self.predictor.bias.add_(amount)
        if not self.shared:
            self.own.add_(amount)

    @torch.no_grad()
    def similarity(self, e: Tensor, codes: Tensor | None = None) -> Tensor:
        """Cosine similarity of each code with each embedding, (B, D) -> (N, B).

        Args:
            codes: what to compare with, (N, D); if absent, the keys or, without keys, the codes.
        """
        A = codes if codes is not None else self.keys if self.own_keys else self.codes  # (N, D)
        if self.center:
            e = e - self.predictor.bias  # (B, D)
            A = A - A.mean(0) if len(A) > 1 else A  # (N, D)
        return F.normalize(A, dim=-1) @ F.normalize(e, dim=-1).T  # (N, B)

    def transport_assignment(self, e: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
        """I = argmax over codes of B Q*: experts of a training batch, (B, D) -> (B,) [Eq. 20]"""
        return sinkhorn(self.similarity(e), eps, iterations).argmax(0)

    def assign(
        self,
        e: Tensor,
        others: Tensor | None = None,
        eps: float = 0.05,
        iterations: int = 3,
        transport: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """f_R(e, A; Q*) = A[:, I]: expert and code of each prompt in training [Eq. 8] [Eq. 21]

        Args:
            e: architecture embeddings of the batch, (B, D).
            others: embeddings of further prompts among which the transport balances, (P, D).
            eps, iterations: of the transport.
            transport: without it each prompt takes its nearest code (the ablation of Table 3).

        Returns:
            I, (B,), chosen without gradient, and the codes' rows for it, (B, D), with gradient.
        """
        if transport:
            E = e if others is None else torch.cat([e, others])  # (B + P, D)
            experts = self.transport_assignment(E, eps, iterations)[: len(e)]  # (B,)
        else:
            experts = self.nearest(e)  # (B,)
        return experts, self.codes[experts]

    def nearest(self, e: Tensor) -> Tensor:
        """The expert whose code has the highest cosine similarity, (B, D) -> (B,) [Eq. 22]

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
        return self.nearest(self(prompts.to(self.own.device)))

    @torch.no_grad()
    def start_codes(
        self,
        z: Tensor,
        *,
        seed: int = 0,
        iterations: int = 50,
        sample: int = 8192,
        transport: bool = True,
        given: Tensor | None = None,
    ) -> None:
        """Set the codes to the centres of a balanced clustering of the prompts' embeddings.

        Lloyd's iterations in which the transport of Eq. 5 does the assigning, so that no cluster
        runs empty.

        Args:
            z: embeddings of training prompts, (P, dz), at least N.
            seed: chooses the first centres and, of more than `sample` prompts, which are used.
            iterations: of assigning and averaging.
            transport: without it the clustering is k-means, and clusters have any size.
            given: clusters of the prompts, (P,), instead.
        """
        rows = torch.randperm(len(z), generator=step_generator(seed, "codes"))[:sample]
        e = self(z[rows].to(self.own.device))  # (P, D)
        centres = e[: self.num_experts].clone()  # (N, D)
        for _ in range(iterations if given is None else 1):
            if given is None:
                scores = self.similarity(e, centres)  # (N, P)
                scores = sinkhorn(scores, iterations=10) if transport else scores
            experts = scores.argmax(0) if given is None else given[rows].to(e.device)  # (P,)
            for i in experts.unique().tolist():
                centres[i] = e[experts == i].mean(0)
        self.keys.copy_(centres)
        self.own.copy_(centres - self.predictor.bias if self.shared else centres)

    def settings(self) -> dict[str, Any]:
        """What `PromptRouter(**settings)` needs to make an empty router of this shape."""
        units, prompt_dim = self.predictor.weight.shape
        return {
            "prompt_dim": prompt_dim,
            "num_units": units,
            "num_experts": self.num_experts,
            "center": self.center,
            "shared": self.shared,
            "own_keys": self.own_keys,
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of a saved router.

        Routers of an earlier version have `codes` instead of `own`, and W z + b for Eq. 4.
        """
        if "codes" in tensors:
            weight, mean = tensors["predictor.weight"], tensors["mean_z"]
            bias = tensors["predictor.bias"] + weight @ mean
            own = tensors["codes"] - bias if self.shared else tensors["codes"]
            tensors = {
                "predictor.weight": weight,
                "predictor.bias": bias,
                "own": own,
                "keys": tensors["codes"],
                "mean_z": mean,
                "content": torch.eye(len(mean)),
            }
        self.load_state_dict(tensors)

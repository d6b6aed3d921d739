"""Which expert a prompt goes to: its embedding's architecture, and the key that is most like it.

Routing stays on the CPU, in float32: so a prompt's expert is the same on every device and in every
precision.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F


class PromptRouter:
    """A sentence encoder, and the tensors that turn its embeddings into experts.

    | tensor | what | shape |
    |---|---|---|
    | `mean_z` | mean embedding of the training prompts | (dz,) |
    | `content` | C, what the captions of one image have in common | (dz, dz) |
    | `weight`, `bias` | W and b of the architecture predictor | (D, dz), (D,) |
    | `keys` | what prompts are compared with, less b | (N, D) |
    """

    def __init__(self, encoder: Any, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        self.encoder, self.tensors, self.settings = encoder, tensors, settings

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> PromptRouter:
        """Read a router's folder; the encoder lies in it, or is a model of the hub."""
        folder = Path(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        encoder = SentenceTransformer(
            settings["encoder"] or str(folder / "encoder"),
            device="cpu",
            model_kwargs={"use_safetensors": True},
        )
        return cls(encoder, load_file(folder / "router.safetensors"), settings)

    @torch.no_grad()
    def similarity(self, prompts: Sequence[str]) -> Tensor:
        """How much each prompt is like each expert's key, (B, N), from -1 to 1."""
        longest = self.settings["max_characters"]
        texts = [prompt[:longest] for prompt in prompts]
        z = self.encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        z = F.normalize(z.detach().clone().float().cpu(), dim=-1)  # (B, dz)
        part = self.tensors
        A, b = part["keys"], part["bias"]  # (N, D), (D,)
        e = (z - part["mean_z"]) @ part["content"].T @ part["weight"].T  # (B, D), less b
        if self.settings["center"]:
            A = A - A.mean(0)
        else:
            A, e = A + b, e + b
        return F.normalize(e, dim=-1) @ F.normalize(A, dim=-1).T

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt."""
        return self.similarity(prompts).argmax(1).tolist()

"""Architecture codes and their gates: Sec. 3.3, Eqs. 9 and 12.

A code a = (u, v) holds one logit for each prunable unit: v for width (GroupNorm groups of a
ResBlock, heads of an attention, slices of a feed-forward layer), u for depth (a whole ResBlock or
Transformer). Noise and a sigmoid turn logits into soft gates; a threshold turns them into binary
ones. `ArchSpace` says which coordinates belong to which layer (`prune_unet.find_units` makes it).

| symbol | name here | shape |
|---|---|---|
| D | `space.size` | - |
| a | `codes`, `logits` | (N, D), (..., D) |
| u, v | `space.split(code)`: dictionaries layer -> logits | (...,), (..., units) |
| gamma | `temperature` | scalar |
| bold a = (u, v), e' | gates in [0, 1], the result of `gumbel_sigmoid` | (..., D) |
| g | `noise` | broadcasts to (..., D) |

The paper prints logits in plain letters and the gates made of them in bold ones.
What differs from the paper: docs/departures.md#gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A run of `units` coordinates of a code, from `start`, that gates the module called `name`."""

    name: str  # path in the U-Net, e.g. "down_blocks.0.resnets.0"
    kind: str  # "resnet", "attention", "feedforward" or "depth"
    start: int
    units: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.units)


@dataclass(frozen=True)
class ArchSpace:
    """The prunable units of a U-Net: width layers first, then depth layers (of one unit each)."""

    layers: tuple[Layer, ...]
    depth: str = "paper"

    @property
    def size(self) -> int:
        """D, the number of prunable units."""
        return sum(layer.units for layer in self.layers)

    @property
    def width_layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind != "depth")

    @property
    def depth_layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == "depth")

    def count(self, kind: str) -> int:
        """Number of units of one kind."""
        return sum(layer.units for layer in self.layers if layer.kind == kind)

    def split(self, code: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A code (..., D) as (u, v): layer name -> (...,) of depth, (..., units) of width.

        Raises:
            ValueError: the last axis is not D.
        """
        if code.shape[-1] != self.size:
            shape = tuple(code.shape)
            raise ValueError(f"a code of this U-Net has {self.size} units, got shape {shape}")
        u = {layer.name: code[..., layer.start] for layer in self.depth_layers}
        v = {layer.name: code[..., layer.span] for layer in self.width_layers}
        return u, v


def inside(layer: Layer, owners: list[str]) -> bool:
    """Whether a layer is one of `owners` or lies in one."""
    return any((layer.name + ".").startswith(owner + ".") for owner in owners)


def removed_layers(code: Tensor, space: ArchSpace) -> list[str]:
    """Names of the ResBlocks and Transformers that a binary code removes."""
    return [layer.name for layer in space.depth_layers if code[layer.start] == 0]


def gumbel_noise(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Gumbel(0, 1) samples, float32, drawn on the CPU so that every device sees the same ones."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    uniform = uniform.clamp(1e-12, 1 - 1e-12)  # log 0 is infinite
    return -torch.log(-torch.log(uniform)).float().to(device or "cpu")


def gumbel_sigmoid(
    logits: Tensor,
    temperature: float = 0.4,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Soft gates sigmoid((logits + g) / gamma), g ~ Gumbel(0, 1), differentiable [Eq. 9] [Eq. 12]

    Eq. 9 applies it to codes (bold u and v), Eq. 12 to embeddings (e').

    Args:
        logits: (..., D).
        temperature: gamma > 0; the paper's value is 0.4.
        generator: a CPU generator; the global one if absent.
        noise: g itself, of a shape that broadcasts to that of `logits`; sampled if absent.

    Returns:
        Gates in [0, 1], of the shape and type of `logits`.

    Raises:
        ValueError: `temperature` <= 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if noise is None:
        noise = gumbel_noise(logits.shape, generator=generator, device=logits.device)  # (..., D)
    return torch.sigmoid((logits + noise) / temperature).to(logits.dtype)


@torch.no_grad()
def binarize(logits: Tensor, space: ArchSpace | None = None, *, threshold: float = 0.0) -> Tensor:
    """Binary gates: open where the logit exceeds `threshold`.

    With a `space`, each width layer keeps its unit of the highest logit open, however low that is.

    Args:
        logits: (..., D).
        space: whose layers keep at least one unit; None for a plain threshold.

    Returns:
        Gates in {0, 1}, of the shape and type of `logits`. Of equal highest logits, one is kept.
    """
    gates = (logits > threshold).to(logits.dtype)  # (..., D)
    for layer in space.width_layers if space is not None else ():
        best = logits[..., layer.span].argmax(-1, keepdim=True)  # (..., 1)
        gates[..., layer.span].scatter_(-1, best, 1.0)
    return gates

"""The architecture space and its gates: Sec. 3.3, Eqs. 9 and 12.

An architecture code a = (u, v) holds one logit for each prunable unit: v for width (GroupNorm
groups of a ResBlock, heads of an attention, slices of a feed-forward layer) and u for depth (a
whole ResBlock or Transformer). `ArchSpace` finds the units of any diffusers `UNet2DConditionModel`
by module type and says which coordinates of a code belong to which layer. The paper prints logits
in plain letters (a, u, v) and the gates made of them in bold ones.

| symbol | name here | shape |
|---|---|---|
| D | `space.size` | - |
| a | `codes`, `logits` | (N, D), (..., D) |
| u, v | `space.split(code)`: dictionaries layer -> logits | (...,), (..., units) |
| gamma | `temperature` | scalar |
| bold a = (u, v), e' | gates in [0, 1], the result of `gumbel_sigmoid` | (..., D) |
| g | `noise` | broadcasts to (..., D) |

Departures from the paper, and what it leaves open:
- Order inside a code: all width units in the U-Net's module order, then the depth units. The paper
  fixes none.
- A feed-forward layer's unit is a 1/32 slice of its inner width, and depth may remove the last
  ResBlock and the last Transformer of each down and up block. The paper names neither; together
  they give the D = 1620 that it states for SD 2.1 (704 groups, 390 heads, 512 slices, 14 layers).
- With one Gumbel variable, P(gate > 1/2) = 1 - exp(-exp(logit)), not sigmoid(logit) as the text
  below Eq. 9 says (that would take the difference of two). Eq. 9 is kept as printed.
- How a code becomes binary is not said. Here a unit is open where its logit exceeds a threshold
  (`binarize`), without noise, so a code gives one expert and always the same one;
  `macs.meet_budget` chooses the threshold, one for all codes, so that the budget is met.
- At least one unit of every layer stays open (the one with the highest logit): a layer without
  channels has no kernel to run. Removing a layer altogether is what the depth units are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

FEEDFORWARD_SLICES = 32

DEPTH_MODES = ("paper", "all", "none")


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

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, depth: str = "paper") -> ArchSpace:
        """Find the units of a diffusers UNet2DConditionModel by module type (App. D.1, D.3).

        Args:
            unet: any device, the meta device included.
            depth: which layers may be removed whole. `paper`: the last ResBlock and the last
                Transformer of each down and up block, where input and output shapes agree; `all`:
                every ResBlock and Transformer where they agree; `none`.

        Raises:
            ValueError: unknown `depth`.
        """
        if depth not in DEPTH_MODES:
            raise ValueError(f"depth must be one of {', '.join(DEPTH_MODES)}, got {depth!r}")
        found: list[tuple[str, str, int]] = []
        for name, module in unet.named_modules():
            if isinstance(module, ResnetBlock2D):
                found.append((name, "resnet", module.norm2.num_groups))
            elif isinstance(module, Attention):
                found.append((name, "attention", module.heads))
            elif isinstance(module, FeedForward):
                slices = math.gcd(module.net[2].in_features, FEEDFORWARD_SLICES)
                found.append((name, "feedforward", slices))
        found += [(name, "depth", 1) for name in removable_layers(unet, depth)]
        layers, start = [], 0
        for name, kind, units in found:
            layers.append(Layer(name, kind, start, units))
            start += units
        return cls(tuple(layers), depth)

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


def removable_layers(unet: UNet2DConditionModel, depth: str) -> list[str]:
    """Names of the ResBlocks and Transformers that a depth unit may remove, in module order."""
    chosen: list[str] = []
    # channels that enter the next ResBlock; those of a skip connection are not counted
    channels = unet.conv_in.out_channels
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    blocks.append(("mid_block", unet.mid_block))
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    for path, block in blocks:
        if block is None:
            continue
        for kind, parent in (("resnets", ResnetBlock2D), ("attentions", Transformer2DModel)):
            members: Sequence[Any] = getattr(block, kind, None) or []
            for index, module in enumerate(members):
                if not isinstance(module, parent):
                    continue
                same_shape = True
                if kind == "resnets":
                    same_shape, channels = module.out_channels == channels, module.out_channels
                last_outside_middle = index == len(members) - 1 and path != "mid_block"
                if same_shape and (depth == "all" or (depth == "paper" and last_outside_middle)):
                    chosen.append(f"{path}.{kind}.{index}")
    return chosen


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

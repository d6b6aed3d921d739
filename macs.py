"""What a code costs: T(a) of Eqs. 15 and 26, and binary codes that meet a budget. Sec. 3.3.1.

A layer's cost depends on how many of its units are kept, and a removed layer costs nothing. So T(a)
is a sum over layers, each a piecewise linear function of the sum of its width gates, times the
depth gate of what it lies in. There are two ways to fill it in: in MACs (multiply-accumulates of
one forward of one image), exactly, by `measure_macs`, and in seconds, by `latency.py`.

| symbol | name here | shape |
|---|---|---|
| T(a) | `CostModel` | (..., D) -> (...,) |
| T_d | `T_d`; `budget` times `CostModel.dense` | scalar |
| B^(i) / B | `shares` | (N,) |
| bold v, u | `widths`, `depths`: W width gates, M depth gates; D = W + M | (..., W), (..., M) |

What differs from the paper: docs/departures.md#macs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from gates import ArchSpace, Layer, binarize, inside
from prune_unet import example_inputs, find_units, meta_copy

LEFTOVER = 0.01  # share of the budget that `meet_budget` may leave unused
ROUNDING = 1e-9  # share of a cost that is taken for an error of double precision
Curve = tuple[Sequence[float], Sequence[float]]  # kept numbers of units, and what they cost


# ---- T(a) ----


@dataclass(frozen=True)
class CostModel:
    """T(a): what each layer's kept units cost, times the depth gate of what the layer lies in."""

    space: ArchSpace
    unit: str  # "MACs" or "seconds"
    # column 0: what is never removed; column j: what depth layer j contains, and removes with it
    fixed: Tensor  # (1 + M,) float64: what no width unit changes
    regions: Tensor  # (L, 1 + M) float64: 1 in the column that a width layer belongs to
    members: Tensor  # (W, L) float64: 1 where a width unit belongs to a layer
    knots: Tensor  # (L, K) float64: kept units from which on another one costs ...
    bends: Tensor  # (L, K) float64: ... this much more than before
    copies: dict[torch.device, list[Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, codes: Tensor) -> Tensor:
        """Gates (..., D), soft or binary -> cost (...,). Differentiable.

        On the CPU it is float64, and MACs are exact for binary gates; elsewhere float32, as not
        every device has more.
        """
        fixed, regions, members, knots, bends = self.constants(codes.device)
        widths, depths = codes.to(fixed.dtype).split([len(members), len(fixed) - 1], dim=-1)
        kept = widths @ members  # (..., L)
        by_layer = (F.relu(kept[..., None] - knots) * bends).sum(-1)  # (..., L)
        by_region = by_layer @ regions + fixed  # (..., 1 + M)
        return by_region[..., 0] + (depths * by_region[..., 1:]).sum(-1)  # (...,)

    def constants(self, device: torch.device) -> list[Tensor]:
        """Its tensors on a device, moved there once."""
        if device not in self.copies:
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            own = (self.fixed, self.regions, self.members, self.knots, self.bends)
            self.copies[device] = [tensor.to(device, dtype) for tensor in own]
        return self.copies[device]

    @cached_property
    def dense(self) -> float:
        """Cost of the unpruned U-Net."""
        return float(self(torch.ones(self.space.size)))

    @property
    def floor(self) -> float:
        """Cost of the smallest expert: removable layers gone, one unit left in the others."""
        return float(self(self.smallest()))

    def smallest(self) -> Tensor:
        """The code of the smallest expert, (D,)."""
        return binarize(torch.zeros(self.space.size), self.space)

    def with_savings(self, factor: float) -> CostModel:
        """The same dense model, of which every code saves `factor` times as much."""
        fixed = factor * self.fixed
        fixed[0] += (1 - factor) * self.dense
        return replace(self, fixed=fixed, bends=factor * self.bends)


def build_cost(
    space: ArchSpace,
    curves: Sequence[Curve],
    contents: Sequence[float],
    whole: float,
    unit: str = "MACs",
) -> CostModel:
    """T(a) from what layers cost on their own.

    What a whole costs beyond its parts does not depend on their widths. Parts that were measured
    one by one may come to more than the whole; they are then scaled down to it.

    Args:
        curves: of each width layer. Kept numbers rise and end with all units; costs do not fall.
            Below the first number the first slope goes on.
        contents: cost of each depth layer as it is in the dense U-Net.
        whole: cost of the dense U-Net.
    """
    owners = [
        next((j for j, owner in enumerate(space.depth_layers, 1) if inside(layer, [owner.name])), 0)
        for layer in space.width_layers
    ]
    regions = F.one_hot(torch.tensor(owners), 1 + len(contents)).double()  # (L, 1 + M)
    units = torch.tensor([layer.units for layer in space.width_layers])
    members = F.one_hot(torch.arange(len(units)).repeat_interleave(units)).double()  # (W, L)
    knots, bends = torch.zeros(2, len(units), max(len(kept) for kept, _ in curves)).double()
    ramps, dense = torch.zeros(2, len(units)).double()  # cost above that of no unit; cost
    for i, curve in enumerate(curves):
        kept, cost = (torch.tensor(values, dtype=torch.float64) for values in curve)
        if kept[0] > 0:
            slope = (cost[1] - cost[0]) / (kept[1] - kept[0]) if len(kept) > 1 else 0.0
            empty = (cost[:1] - slope * kept[0]).clamp(min=0)
            kept, cost = torch.cat([kept.new_zeros(1), kept]), torch.cat([empty, cost])
        slopes = cost.diff() / kept.diff()
        knots[i, : len(slopes)] = kept[:-1]
        bends[i, : len(slopes)] = slopes.diff(prepend=slopes.new_zeros(1))
        ramps[i], dense[i] = cost[-1] - cost[0], cost[-1]
    total = torch.tensor([whole, *contents], dtype=torch.float64)  # (1 + M,)
    parts = dense @ regions
    parts[0] += total[1:].sum()
    share = (total / parts.clamp(min=1e-30)).clamp(max=1)  # (1 + M,)
    share[1:] *= share[0]
    fixed = torch.cat([total[:1], share[0] * total[1:]])
    fixed[0] -= fixed[1:].sum()
    fixed -= share * (ramps @ regions)
    return CostModel(
        space, unit, fixed, regions, members, knots, (regions @ share)[:, None] * bends
    )


# ---- MACs ----


def module_macs(unet: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    """MACs of every module by `torch.utils.flop_counter`, by path; "" is the whole U-Net.

    The counter does not know every fused attention (the CPU's, for one), so attention runs as plain
    matrix products here.
    """
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        unet(**inputs)
    root = type(unet).__name__ + "."
    macs = {path: sum(ops.values()) // 2 for path, ops in counter.get_flop_counts().items()}
    by_module = {path.removeprefix(root): n for path, n in macs.items() if path.startswith(root)}
    return Counter({"": macs["Global"]} | by_module)


def measure_macs(
    unet: nn.Module,
    space: ArchSpace | None = None,
    *,
    latent_size: int,
    text_tokens: int = 77,
) -> CostModel:
    """Read T(a) in MACs off a U-Net, once, on the meta device, where no weight is allocated.

    A layer's MACs are linear in the units that it keeps.

    Args:
        unet: on any device; only its configuration is used.
        space: its architecture space; `find_units(unet)` if absent.
        latent_size: height and width of the latent: pixels / 8.
        text_tokens: length of the text states.
    """
    space = space or find_units(unet)
    model = meta_copy(unet)
    macs = module_macs(model, example_inputs(model, latent_size, text_tokens))
    curves = []
    for layer in space.width_layers:
        scaled = prunable_macs(layer, macs)
        assert scaled % layer.units == 0, (layer, scaled)
        curves.append(((0, layer.units), (macs[layer.name] - scaled, macs[layer.name])))
    return build_cost(space, curves, [macs[layer.name] for layer in space.depth_layers], macs[""])


def prunable_macs(layer: Layer, macs: Counter[str]) -> int:
    """MACs of a width layer that scale with its kept units: all but a ResBlock's shortcut."""
    if layer.kind != "resnet":
        return macs[layer.name]
    return sum(macs[f"{layer.name}.{part}"] for part in ("conv1", "time_emb_proj", "conv2"))


# ---- budgets ----


@torch.no_grad()
def budget_shift(logits: Tensor, temperature: float, cost: CostModel, T_d: float) -> Tensor:
    """The number which, added to all logits, makes their soft gates cost T_d on average.

    T grows with the shift, so bisection finds it, to a millionth of the logits' range; a scalar on
    the logits' device, for which nothing waits. A budget of the whole model leaves nothing to hold:
    0.

    Args:
        logits: with their noise, (B, D).
        temperature: gamma of Eq. 9.
        cost: T(a) of the U-Net.
        T_d: the budget, in the unit of `cost`.
    """
    dtype = torch.float64 if logits.device.type == "cpu" else torch.float32
    reach = logits.abs().max().to(dtype) + 20 * temperature  # -reach closes all gates, reach opens
    if T_d >= cost.dense:
        return torch.zeros_like(reach)
    low, high = -reach, reach
    for _ in range(24):
        middle = (low + high) / 2
        over = cost(torch.sigmoid((logits + middle) / temperature)).mean() > T_d
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def check_budget(budget: float, cost: CostModel) -> None:
    """Raises `UserError` where `budget` is outside (0, 1] or below the smallest expert."""
    if not 0 < budget <= 1:
        raise UserError(
            f"--budget {budget} is not a share of the dense model's {cost.unit}; choose a number "
            "in (0, 1]"
        )
    if budget * cost.dense < cost.floor * (1 - ROUNDING):
        floor = cost.floor / cost.dense
        raise UserError(
            f"--budget {budget} cannot be reached: with everything prunable gone {floor:.3f} is "
            f"left ({cost.floor:.3g} of {cost.dense:.3g} {cost.unit}); choose a budget in "
            f"[{min(floor + 0.0005, 1):.3f}, 1]"
        )


@torch.no_grad()
def meet_budget(codes: Tensor, shares: Tensor, cost: CostModel, budget: float) -> Tensor:
    """Binary codes whose share-weighted mean cost is at most, and nearly, the budget.

    One threshold serves all codes: their relative sizes stay what training made them. Units are
    closed from the lowest logit upwards until the mean meets the budget. Then closed units that
    still fit are opened again, from the highest logit downwards. Where more than 1 % of the budget
    is left unused, the unit that was closed last was a whole layer. That layer is then kept open,
    and the search starts again.

    Args:
        codes: logits, (N, D); a unit with -inf stays closed.
        shares: share of the prompts that each code serves, (N,), >= 0; their sum counts as one.
        cost: T(a) of the U-Net.
        budget: share of the dense model's cost, in (0, 1].

    Returns:
        Gates in {0, 1}, (N, D), float32.

    Raises:
        UserError: the budget is below what can be pruned.
        ValueError: the shapes do not agree, or no code serves a prompt.
    """
    check_budget(budget, cost)
    codes, shares = codes.detach().float().cpu(), shares.double().cpu()
    if codes.shape != (*shares.shape, cost.space.size) or not shares.sum() > 0:
        raise ValueError(f"{tuple(codes.shape)} codes do not go with shares {shares.tolist()}")
    shares = shares / shares.sum()  # in single precision they sum to one but nearly
    T_d = budget * cost.dense * (1 + ROUNDING)
    is_depth = torch.zeros(cost.space.size, dtype=torch.bool)
    is_depth[[layer.start for layer in cost.space.depth_layers]] = True
    best, least = torch.empty(0), float("inf")
    for _ in range(1 + int(is_depth.sum()) * len(codes)):
        gates, threshold = close_units(codes, shares, cost, T_d)
        gates = reopen_units(gates, codes, shares, cost, T_d)
        unused = T_d - float(shares @ cost(gates))
        if unused < least:
            best, least = gates, unused
        last = ((codes == threshold) & is_depth & (gates == 0) & (shares > 0)[:, None]).nonzero()
        if least <= LEFTOVER * T_d or len(last) == 0 or math.isinf(threshold):
            break
        codes = codes.index_put(tuple(last[0]), codes.new_tensor(torch.inf))
    return best


def close_units(codes: Tensor, shares: Tensor, cost: CostModel, T_d: float) -> tuple[Tensor, float]:
    """The binary codes of the lowest threshold that meets the budget, and that threshold."""
    thresholds = torch.cat([codes.new_tensor([-torch.inf]), codes.flatten().sort().values])
    low, high = 0, len(thresholds) - 1  # the threshold's place lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        gates = binarize(codes, cost.space, threshold=thresholds[middle].item())
        fits = float(shares @ cost(gates)) <= T_d
        low, high = (low, middle) if fits else (middle + 1, high)
    threshold = thresholds[low].item()
    return binarize(codes, cost.space, threshold=threshold), threshold


def reopen_units(
    gates: Tensor, codes: Tensor, shares: Tensor, cost: CostModel, T_d: float
) -> Tensor:
    """Open closed units of `gates` as long as the mean meets T_d, highest logit first.

    Units that cost nothing stay closed: those of removed layers and of experts without prompts.
    """
    gates, prices = gates.clone(), cost(gates)  # (N, D), (N,)
    reserve = T_d - float(shares @ prices)
    for place in codes.flatten().argsort(descending=True).tolist():
        expert, unit = divmod(place, codes.shape[1])
        if reserve < 1e-4 * T_d or codes[expert, unit] == -torch.inf:
            break
        if gates[expert, unit] == 1:
            continue
        trial = gates[expert].clone()
        trial[unit] = 1
        price = cost(trial)
        more = float(shares[expert] * (price - prices[expert]))
        if ROUNDING * T_d < more <= reserve:
            gates[expert], prices[expert], reserve = trial, price, reserve - more
    return gates

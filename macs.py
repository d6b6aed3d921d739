"""What a code costs: T(a) of Eqs. 15 and 26, and binary codes that meet a budget. Sec. 3.3.1.

MACs are multiply-accumulates of one forward of one image. A layer's MACs are linear in the units
that it keeps, and a removed layer has none, so T(a) is a closed form. Its coefficients are read off
the U-Net once, on the meta device, where no weight is allocated.

| symbol | name here | shape |
|---|---|---|
| T(a) | `MacsModel` | (..., D) -> (...,) |
| T_d | `budget` times `MacsModel.dense` | scalar |
| B^(i) / B | `shares` | (N,) |
| bold v, u | `widths`, `depths`: W width gates, M depth gates; D = W + M | (..., W), (..., M) |

What differs from the paper: docs/departures.md#macs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from gates import ArchSpace, Layer, binarize
from prune_unet import example_inputs, find_units, meta_copy

LEFTOVER = 0.01  # share of the budget that `meet_budget` may leave unused


# ---- counting ----


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


# ---- T(a) ----


@dataclass(frozen=True)
class MacsModel:
    """T(a): linear in each layer's kept fraction, times the layer's depth gate."""

    space: ArchSpace
    # column 0: what is never removed; column j: what depth layer j contains, and removes with it
    unit_cost: Tensor  # (W, 1 + M) float64: MACs of each width unit, in one of the columns
    fixed_cost: Tensor  # (1 + M,) float64: MACs that no width unit changes

    def __call__(self, codes: Tensor) -> Tensor:
        """Gates (..., D), soft or binary -> MACs (...,). Differentiable.

        On the CPU they are float64, and exact for binary gates; elsewhere float32, as not every
        device has more.
        """
        dtype = torch.float64 if codes.device.type == "cpu" else torch.float32
        unit_cost, fixed_cost = (
            t.to(codes.device, dtype) for t in (self.unit_cost, self.fixed_cost)
        )
        widths, depths = codes.to(dtype).split([unit_cost.shape[0], unit_cost.shape[1] - 1], dim=-1)
        by_region = widths @ unit_cost + fixed_cost  # (..., 1 + M)
        return by_region[..., 0] + (depths * by_region[..., 1:]).sum(-1)  # (...,)

    @property
    def dense(self) -> int:
        """MACs of the unpruned U-Net."""
        return round(self(torch.ones(self.space.size)).item())

    @property
    def floor(self) -> int:
        """MACs of the smallest expert: removable layers gone, one unit left in the others."""
        return round(self(self.smallest()).item())

    def smallest(self) -> Tensor:
        """The code of the smallest expert, (D,)."""
        return binarize(torch.zeros(self.space.size), self.space)


def measure_macs(
    unet: nn.Module,
    space: ArchSpace | None = None,
    *,
    latent_size: int,
    text_tokens: int = 77,
) -> MacsModel:
    """Read T(a)'s coefficients off a U-Net, once, on the meta device.

    Args:
        unet: on any device; only its configuration is used.
        space: its architecture space; `find_units(unet)` if absent.
        latent_size: height and width of the latent: pixels / 8.
        text_tokens: length of the text states.
    """
    space = space or find_units(unet)
    model = meta_copy(unet)
    macs = module_macs(model, example_inputs(model, latent_size, text_tokens))
    regions = {layer.name: index for index, layer in enumerate(space.depth_layers, start=1)}

    def region_of(name: str) -> int:
        return next((i for owner, i in regions.items() if (name + ".").startswith(owner + ".")), 0)

    fixed = torch.zeros(1 + len(regions), dtype=torch.float64)  # (1 + M,)
    fixed[0] = macs[""] - sum(macs[name] for name in regions)
    for name, index in regions.items():
        fixed[index] = macs[name]
    width_units = sum(layer.units for layer in space.width_layers)
    costs = torch.zeros(width_units, len(fixed), dtype=torch.float64)  # (W, 1 + M)
    for layer in space.width_layers:
        scaled = prunable_macs(layer, macs)
        assert scaled % layer.units == 0, (layer, scaled)
        costs[layer.span, region_of(layer.name)] = scaled // layer.units
        fixed[region_of(layer.name)] -= scaled
    return MacsModel(space, costs, fixed)


def prunable_macs(layer: Layer, macs: Counter[str]) -> int:
    """MACs of a width layer that scale with its kept units: all but a ResBlock's shortcut."""
    if layer.kind != "resnet":
        return macs[layer.name]
    return sum(macs[f"{layer.name}.{part}"] for part in ("conv1", "time_emb_proj", "conv2"))


# ---- budgets ----


@torch.no_grad()
def budget_shift(logits: Tensor, temperature: float, macs: MacsModel, budget_macs: float) -> float:
    """The number which, added to all logits, makes their soft gates cost T_d on average.

    T grows with the shift, so bisection finds it, to a millionth of the logits' range. A budget of
    the whole model leaves nothing to hold: 0.

    Args:
        logits: with their noise, (B, D).
        temperature: gamma of Eq. 9.
        macs: T(a) of the U-Net.
        budget_macs: T_d, MACs.
    """
    if budget_macs >= macs.dense:
        return 0.0
    reach = logits.abs().max().item() + 20 * temperature  # -reach closes all gates, reach opens
    low, high = -reach, reach
    for _ in range(24):
        middle = (low + high) / 2
        cost = macs(torch.sigmoid((logits + middle) / temperature)).mean().item()
        over = cost > budget_macs
        low, high = (low, middle) if over else (middle, high)
    return (low + high) / 2


def check_budget(budget: float, macs: MacsModel) -> None:
    """Raises `UserError` where `budget` is outside (0, 1] or below the smallest expert."""
    if not 0 < budget <= 1:
        raise UserError(
            f"--budget {budget} is not a share of the dense model's MACs; choose a number in (0, 1]"
        )
    if budget * macs.dense < macs.floor:
        floor = macs.floor / macs.dense
        raise UserError(
            f"--budget {budget} cannot be reached: with everything prunable gone {floor:.3f} of "
            f"the MACs are left; choose a budget in [{floor + 0.0005:.3f}, 1]"
        )


@torch.no_grad()
def meet_budget(codes: Tensor, shares: Tensor, macs: MacsModel, budget: float) -> Tensor:
    """Binary codes whose share-weighted mean MACs are at most, and nearly, the budget.

    One threshold serves all codes: their relative sizes stay what training made them. Units are
    closed from the lowest logit upwards until the mean meets the budget. Then closed units that
    still fit are opened again, from the highest logit downwards. Where more than 1 % of the budget
    is left unused, the unit that was closed last was a whole layer. That layer is then kept open,
    and the search starts again.

    Args:
        codes: logits, (N, D).
        shares: share of the prompts that each code serves, (N,), >= 0; their sum counts as one.
        macs: T(a) of the U-Net.
        budget: share of the dense model's MACs, in (0, 1].

    Returns:
        Gates in {0, 1}, (N, D), float32.

    Raises:
        UserError: the budget is below what can be pruned.
        ValueError: the shapes do not agree, or no code serves a prompt.
    """
    check_budget(budget, macs)
    codes, shares = codes.detach().float().cpu(), shares.double().cpu()
    if codes.shape != (*shares.shape, macs.space.size) or not shares.sum() > 0:
        raise ValueError(f"{tuple(codes.shape)} codes do not go with shares {shares.tolist()}")
    shares = shares / shares.sum()  # in single precision they sum to one but nearly
    budget_macs = budget * macs.dense + 0.5  # half a MAC, against rounding
    is_depth = torch.zeros(macs.space.size, dtype=torch.bool)
    is_depth[macs.unit_cost.shape[0] :] = True
    best, least = torch.empty(0), float("inf")
    for _ in range(1 + int(is_depth.sum()) * len(codes)):
        gates, threshold = close_units(codes, shares, macs, budget_macs)
        gates = reopen_units(gates, codes, shares, macs, budget_macs)
        unused = budget_macs - float(shares @ macs(gates))
        if unused < least:
            best, least = gates, unused
        last = ((codes == threshold) & is_depth & (gates == 0) & (shares > 0)[:, None]).nonzero()
        if least <= LEFTOVER * budget_macs or len(last) == 0 or threshold == torch.inf:
            break
        codes = codes.index_put(tuple(last[0]), codes.new_tensor(torch.inf))
    return best


def close_units(
    codes: Tensor, shares: Tensor, macs: MacsModel, budget_macs: float
) -> tuple[Tensor, float]:
    """The binary codes of the lowest threshold that meets the budget, and that threshold."""
    thresholds = torch.cat([codes.new_tensor([-torch.inf]), codes.flatten().sort().values])
    low, high = 0, len(thresholds) - 1  # the threshold's place lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        gates = binarize(codes, macs.space, threshold=thresholds[middle].item())
        fits = float(shares @ macs(gates)) <= budget_macs
        low, high = (low, middle) if fits else (middle + 1, high)
    threshold = thresholds[low].item()
    return binarize(codes, macs.space, threshold=threshold), threshold


def reopen_units(
    gates: Tensor, codes: Tensor, shares: Tensor, macs: MacsModel, budget_macs: float
) -> Tensor:
    """Open closed units of `gates` as long as the mean meets `budget_macs`, highest logit first.

    Units that cost nothing stay closed: those of removed layers and of experts without prompts.
    """
    gates, prices = gates.clone(), macs(gates)  # (N, D), (N,)
    reserve = budget_macs - float(shares @ prices)
    for place in codes.flatten().argsort(descending=True).tolist():
        expert, unit = divmod(place, codes.shape[1])
        if reserve < 1e-4 * budget_macs:
            break
        if gates[expert, unit] == 1:
            continue
        trial = gates[expert].clone()
        trial[unit] = 1
        price = macs(trial)
        cost = float(shares[expert] * (price - prices[expert]))
        if 0 < cost <= reserve:
            gates[expert], prices[expert], reserve = trial, price, reserve - cost
    return gates

"""What a code costs: T(a) of Eqs. 15 and 26, and binary codes that meet a budget. Sec. 3.3.1.

| symbol | name here | shape |
|---|---|---|
| T(a) | `MacsModel` | (..., D) -> (...,) |
| T_d | `budget` times `MacsModel.dense` | scalar |
| B^(i) / B | `shares` | (N,) |
| bold v, u | `widths`, `depths`: W width gates, M depth gates; D = W + M | (..., W), (..., M) |

MACs are multiply-accumulates of one forward of one image. A layer's MACs are linear in the units
that it keeps, and a removed layer has none, so T(a) is a closed form. Its coefficients are read off
the U-Net once, on the meta device, where no weight is allocated.

Departures from the paper, and what it leaves open:
- MACs are counted exactly, as `torch.utils.flop_counter` counts matrix products (half its flops).
  The paper's 1384.2 G for SD 2.1 at 768 px come from counting cross-attention as S x S instead of
  S x 77; the true figure is 1074.6 G. Budgets mean the true count; `plan.paper_macs` repeats the
  paper's.
- Soft gates enter T(a) as they are: a layer costs its cost times the mean of its gates, times its
  depth gate. The paper does not say how it prices them.
- `meet_budget` turns trained codes into binary ones that meet the budget; the paper does not say
  how it does.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from gates import ArchSpace, Layer, binarize

LEFTOVER = 0.01  # share of the budget that `meet_budget` may leave unused


# ---- counting ----


def skeleton(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net of the same configuration on the meta device: shapes without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet.config).eval()


def example_inputs(
    unet: UNet2DConditionModel,
    latent_size: int,
    text_tokens: int,
    device: str | torch.device = "meta",
) -> dict[str, Any]:
    """Keyword arguments of one forward of one image."""
    config = unet.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    size = (1, config.in_channels, latent_size, latent_size)
    inputs: dict[str, Any] = {
        "sample": torch.zeros(size, device=device),
        "timestep": torch.zeros(1, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(1, text_tokens, width, device=device),
    }
    if config.addition_embed_type == "text_time":  # SDXL: pooled text and six sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, pooled, device=device),
            "time_ids": torch.zeros(1, 6, device=device),
        }
    return inputs


def module_macs(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Counter[str]:
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
        """Gates (..., D), soft or binary -> MACs (...,), float64; whole numbers for binary gates.

        Differentiable.
        """
        unit_cost, fixed_cost = self.unit_cost.to(codes.device), self.fixed_cost.to(codes.device)
        widths, depths = codes.double().split([unit_cost.shape[0], unit_cost.shape[1] - 1], dim=-1)
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
    unet: UNet2DConditionModel,
    space: ArchSpace | None = None,
    *,
    latent_size: int,
    text_tokens: int = 77,
) -> MacsModel:
    """Read T(a)'s coefficients off a U-Net, once, on the meta device.

    Args:
        unet: a diffusers UNet2DConditionModel, on any device; only its configuration is used.
        space: its architecture space; `ArchSpace.from_unet(unet)` if absent.
        latent_size: height and width of the latent: pixels / 8.
        text_tokens: length of the text states.
    """
    space = space or ArchSpace.from_unet(unet)
    model = skeleton(unet)
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
def budget_shift(logits: Tensor, temperature: float, macs: MacsModel, target: float) -> float:
    """The number which, added to all logits, makes their soft gates cost `target` MACs on average.

    T grows with the shift, so bisection finds it, to a millionth of the logits' range.

    Args:
        logits: with their noise, (B, D).
        temperature: gamma of Eq. 9.
        macs: T(a) of the U-Net.
        target: T_d, MACs.
    """
    reach = logits.abs().max().item() + 20 * temperature  # -reach closes all gates, reach opens
    low, high = -reach, reach
    for _ in range(24):
        middle = (low + high) / 2
        over = macs(torch.sigmoid((logits + middle) / temperature)).mean().item() > target
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
    closed from the lowest logit upwards until the mean meets the budget; then closed units that
    still fit are opened again, from the highest logit downwards. Where that leaves more than 1 % of
    the budget unused, the unit closed last was a whole layer: it stays, and others go in its place.

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
    target = budget * macs.dense + 0.5  # half a MAC, against rounding
    is_depth = torch.zeros(macs.space.size, dtype=torch.bool)
    is_depth[macs.unit_cost.shape[0] :] = True
    best, least = torch.empty(0), float("inf")
    for _ in range(1 + int(is_depth.sum()) * len(codes)):
        gates, threshold = close_units(codes, shares, macs, target)
        gates = reopen_units(gates, codes, shares, macs, target)
        unused = target - float(shares @ macs(gates))
        if unused < least:
            best, least = gates, unused
        last = ((codes == threshold) & is_depth & (gates == 0) & (shares > 0)[:, None]).nonzero()
        if least <= LEFTOVER * target or len(last) == 0 or threshold == torch.inf:
            break
        codes = codes.index_put(tuple(last[0]), codes.new_tensor(torch.inf))
    return best


def close_units(
    codes: Tensor, shares: Tensor, macs: MacsModel, target: float
) -> tuple[Tensor, float]:
    """The lowest threshold whose binary codes meet `target` MACs: (those codes, the threshold)."""
    thresholds = torch.cat([codes.new_tensor([-torch.inf]), codes.flatten().sort().values])
    low, high = 0, len(thresholds) - 1  # the threshold's place lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        gates = binarize(codes, macs.space, threshold=thresholds[middle].item())
        fits = float(shares @ macs(gates)) <= target
        low, high = (low, middle) if fits else (middle + 1, high)
    threshold = thresholds[low].item()
    return binarize(codes, macs.space, threshold=threshold), threshold


def reopen_units(
    gates: Tensor, codes: Tensor, shares: Tensor, macs: MacsModel, target: float
) -> Tensor:
    """Open closed units of `gates`, highest logit first, each one if the mean still meets `target`.

    Units that cost nothing stay closed: those of removed layers and of experts without prompts.
    """
    gates, prices = gates.clone(), macs(gates)  # (N, D), (N,)
    reserve = target - float(shares @ prices)
    for place in codes.flatten().argsort(descending=True).tolist():
        expert, unit = divmod(place, codes.shape[1])
        if reserve < 1e-4 * target:
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


# ---- what is left of each block ----


def retained(codes: Tensor, macs: MacsModel) -> tuple[list[str], Tensor]:
    """Share of each block's prunable MACs that each expert keeps: Figs. 11-12.

    A block is a ResBlock or a Transformer. Prunable is what goes if all of its units are closed.

    Args:
        codes: gates, (N, D).

    Returns:
        Names of the blocks in the order of computation, and the shares, (blocks, N), in [0, 1]. A
        share is 0 only where the block is removed whole.
    """
    blocks: dict[str, list[slice]] = {}
    for layer in macs.space.layers:
        inside = re.match(r".*?\.(resnets|attentions)\.\d+", layer.name)
        blocks.setdefault(inside.group() if inside else layer.name, []).append(layer.span)

    def place(name: str) -> tuple[int, int, int, bool]:
        level, *rest = name.split(".")
        numbers = [int(part) for part in rest if part.isdigit()]
        stage = ("down_blocks", "mid_block", "up_blocks").index(level)
        return stage, numbers[0] if stage != 1 else 0, numbers[-1], "attentions" in rest

    names, kept = sorted(blocks, key=place), []
    for name in names:
        pruned, gone = torch.ones(codes.shape), torch.ones(macs.space.size)
        for span in blocks[name]:
            pruned[:, span], gone[span] = codes[:, span].to(pruned), 0
        kept.append((macs(pruned) - macs(gone)) / (macs.dense - macs(gone)))  # (N,)
    return names, torch.stack(kept)

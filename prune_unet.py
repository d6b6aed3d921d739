"""Pruning a stock diffusers U-Net: Sec. 3.3 and App. D.3, Eqs. 10-11, 23-24.

`attach_gates` multiplies gates into a running U-Net (for training), `measure_macs` prices a code, `cut_expert` removes what a
binary code closes and gives an ordinary, smaller U-Net with the same outputs (for deployment).

| symbol | name here | shape |
|---|---|---|
| bold u, v | gates, split by `ArchSpace` | (B, D) |
| F_l (.) v_l | hook on the input of the layer that reads the pruned width | (B, C, h, w), (B, S, C) |
| u f(F) + (1 - u) F | hook on the output of a ResBlock or Transformer | (B, C, h, w) |
| T(a) | `MacsModel` | (..., D) -> (...,) |

Where the gates sit, and why there:
- ResBlock: on the input of `conv2`, after `norm2` and the nonlinearity; a unit is one of `norm2`'s groups. Each group is normalised on its own,
  so a closed one contributes exactly nothing and can be cut. A mask before `norm2` would do neither: the norm cancels a soft
  mask's scale (no gradient reaches the gate) and turns a zeroed group into its bias.
- attention: on the input of `to_out`, a unit is a head; feed-forward: on the input of the last linear layer, a unit is a 1/32 slice.
- depth: on the output of a ResBlock or of a whole Transformer2DModel. In a decoder the ResBlock reads its input concatenated with
  the skip connection; what replaces it is the first part alone (Eq. 24).

Departures from the paper:
- MACs are counted exactly, as `torch.utils.flop_counter` counts matrix products (half its flops); the paper counts cross-attention as S x S
  instead of S x 77. Budgets here mean the exact count.
- Soft gates enter the MACs as they are: a layer costs its cost times the mean of its gates, times its depth gate.
- `meet_budget` turns trained codes into binary ones that meet the budget; the paper does not say how it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from gates import ArchSpace, binarize
from runfolder import UserError, load_tensors, save_tensors

# ---- gates on a running U-Net ----


class GateHandle:
    """The hooks of `attach_gates`. Without gates set, the U-Net computes what it always did."""

    def __init__(self, unet: nn.Module, space: ArchSpace) -> None:
        self.space = space
        self.masks: dict[tuple[str, str], Tensor] = {}  # (kind, layer) -> (B, 1, C), (B, C, 1, 1) or (B, 1, 1, 1)
        self.channels = {layer.name: reader(unet, layer.name, layer.kind)[1] for layer in space.width_layers}
        self.hooks: list[RemovableHandle] = []
        for layer in space.width_layers:
            module, _ = reader(unet, layer.name, layer.kind)
            self.hooks.append(module.register_forward_pre_hook(self.width_hook((layer.kind, layer.name))))
        for layer in space.depth_layers:
            self.hooks.append(unet.get_submodule(layer.name).register_forward_hook(self.depth_hook((layer.kind, layer.name))))

    def set_gates(self, a: Tensor | None) -> None:
        """Use one code for each sample of the batches to come.

        A batch of k B samples repeats the codes k times, as classifier-free guidance repeats its prompts.

        Args:
            a: gates in [0, 1], (B, D), soft or binary; None for the dense model.

        Raises:
            ValueError: `a` is not (B, D).
        """
        self.masks = {}
        if a is None:
            return
        if a.ndim != 2 or a.shape[1] != self.space.size:
            raise ValueError(f"gates must be (B, {self.space.size}), got shape {tuple(a.shape)}")
        u, v = self.space.split(a)
        for layer in self.space.width_layers:
            mask = v[layer.name].repeat_interleave(self.channels[layer.name] // layer.units, dim=1)  # (B, C)
            self.masks[layer.kind, layer.name] = mask[:, :, None, None] if layer.kind == "resnet" else mask[:, None, :]
        for layer in self.space.depth_layers:
            self.masks[layer.kind, layer.name] = u[layer.name][:, None, None, None]

    def mask(self, key: tuple[str, str], features: Tensor) -> Tensor | None:
        """The mask of a layer for a batch like `features`, or None for the dense model."""
        mask = self.masks.get(key)
        if mask is None:
            return None
        repeats, rest = divmod(features.shape[0], mask.shape[0])
        if rest:
            raise ValueError(f"a batch of {features.shape[0]} samples is no multiple of the {mask.shape[0]} codes that were set")
        if repeats > 1:
            mask = mask.repeat(repeats, *[1] * (mask.ndim - 1))
        return mask.to(features.dtype)

    def width_hook(self, key: tuple[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            """F_l (.) v_l, the mask repeated over a unit's channels [Eq. 10]"""
            mask = self.mask(key, inputs[0])
            return None if mask is None else (inputs[0] * mask, *inputs[1:])

        return hook

    def depth_hook(self, key: tuple[str, str]) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            u = self.mask(key, inputs[0])
            if u is None:
                return None
            if isinstance(output, tuple):  # a Transformer2DModel called with return_dict=False
                return (blend(u, output[0], inputs[0]), *output[1:])
            return blend(u, output, inputs[0])

        return hook

    def detach(self) -> None:
        """Remove every hook; the U-Net is as it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.masks = [], {}


def attach_gates(unet: nn.Module, space: ArchSpace | None = None) -> GateHandle:
    """Attach gates to a stock U-Net through forward hooks; its weights and code stay untouched.

    Args:
        unet: a diffusers UNet2DConditionModel.
        space: its architecture space; `ArchSpace.from_unet(unet)` if absent.
    """
    return GateHandle(unet, space or ArchSpace.from_unet(unet))


def reader(unet: nn.Module, name: str, kind: str) -> tuple[nn.Module, int]:
    """The module that reads a width layer's features, and how many channels it reads."""
    owner = unet.get_submodule(name)
    if kind == "resnet":
        return owner.conv2, owner.conv2.in_channels
    linear = owner.to_out[0] if kind == "attention" else owner.net[2]
    return linear, linear.in_features


def blend(u: Tensor, output: Tensor, features: Tensor) -> Tensor:
    """u f(F) + (1 - u) F for a layer that may be removed [Eq. 11] [Eq. 23] [Eq. 24]

    In a decoder's ResBlock `features` is F || F_skip, of which the leading channels are F.
    """
    return u * output + (1 - u) * features[:, : output.shape[1]]


class BlockRecorder:
    """Keeps the outputs of a U-Net's down, middle and up blocks, for block distillation (Eq. 28)."""

    def __init__(self, unet: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        blocks = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
        self.hooks = [block.register_forward_hook(self.keep) for block in blocks]

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)  # a down block also gives its skip connections

    def take(self) -> list[Tensor]:
        """The outputs since the last call, in the order of computation; forgets them."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()


# ---- what a code costs ----


@dataclass(frozen=True)
class MacsModel:
    """T(a): multiply-accumulates of one image, one forward. Linear in each layer's kept fraction, times the layer's depth gate."""

    space: ArchSpace
    unit_cost: Tensor  # (W, 1 + M) float64: MACs of a width unit, in the column of the depth layer that holds it (0: none)
    fixed_cost: Tensor  # (1 + M,) float64: MACs that no width unit changes, by depth layer

    def __call__(self, codes: Tensor) -> Tensor:
        """Gates (..., D), soft or binary -> MACs (...,), float64, differentiable; a whole number for a binary code."""
        unit_cost, fixed_cost = self.unit_cost.to(codes.device), self.fixed_cost.to(codes.device)
        widths, depths = codes.double().split([unit_cost.shape[0], unit_cost.shape[1] - 1], dim=-1)
        by_region = widths @ unit_cost + fixed_cost  # (..., 1 + M)
        return by_region[..., 0] + (depths * by_region[..., 1:]).sum(-1)

    @property
    def dense(self) -> int:
        """MACs of the unpruned U-Net."""
        return round(self(torch.ones(self.space.size)).item())

    @property
    def floor(self) -> int:
        """MACs of the smallest expert: every removable layer gone, one unit left in the others."""
        smallest = binarize(torch.zeros(self.space.size), self.space)
        return round(self(smallest).item())


def skeleton(unet: nn.Module) -> UNet2DConditionModel:
    """A U-Net of the same configuration on the meta device: shapes without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet.config).eval()


def example_inputs(unet: nn.Module, latent_size: int, text_tokens: int, device: str | torch.device = "meta") -> dict[str, Any]:
    """Keyword arguments of one forward of one image."""
    config = unet.config
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else config.cross_attention_dim[0]
    inputs: dict[str, Any] = {
        "sample": torch.zeros(1, config.in_channels, latent_size, latent_size, device=device),
        "timestep": torch.zeros(1, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(1, text_tokens, width, device=device),
    }
    if config.addition_embed_type == "text_time":  # SDXL: pooled text and six sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled, device=device), "time_ids": torch.zeros(1, 6, device=device)}
    return inputs


def module_macs(unet: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """MACs of every module by `torch.utils.flop_counter`, by path; "" is the whole U-Net.

    The counter does not know every fused attention (the CPU's, for one), so attention runs as plain matrix products here.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    root = type(unet).__name__
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return {"": counts["Global"]} | {name.removeprefix(root + "."): n for name, n in counts.items() if name.startswith(root + ".")}


def measure_macs(unet: nn.Module, space: ArchSpace | None = None, *, latent_size: int, text_tokens: int = 77) -> MacsModel:
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
        return next((index for owner, index in regions.items() if name == owner or name.startswith(owner + ".")), 0)

    fixed = torch.zeros(1 + len(regions), dtype=torch.float64)
    fixed[0] = macs[""] - sum(macs[name] for name in regions)
    for name, index in regions.items():
        fixed[index] = macs[name]
    costs = torch.zeros(sum(layer.units for layer in space.width_layers), len(fixed), dtype=torch.float64)
    for layer in space.width_layers:
        scaled = sum(macs.get(f"{layer.name}.{part}", 0) for part in ("conv1", "time_emb_proj", "conv2")) if layer.kind == "resnet" else macs[layer.name]
        assert scaled % layer.units == 0, (layer, scaled)
        costs[layer.span, region_of(layer.name)] = scaled // layer.units
        fixed[region_of(layer.name)] -= scaled
    return MacsModel(space, costs, fixed)


@torch.no_grad()
def meet_budget(codes: Tensor, shares: Tensor, macs: MacsModel, budget: float) -> Tensor:
    """Binary codes whose share-weighted mean MACs are at most, and nearly, `budget` times the dense model's.

    One threshold serves all codes: their relative sizes stay what training made them. Units are closed from the lowest logit upwards
    until the mean meets the budget; then closed units that still fit are opened again, from the highest logit downwards.

    Args:
        codes: logits, (N, D).
        shares: share of the prompts that each code serves, (N,), sums to one.
        macs: T(a) of the U-Net.
        budget: share of the dense model's MACs, in (0, 1].

    Returns:
        Gates in {0, 1}, (N, D), float32.

    Raises:
        UserError: the budget is below what can be pruned.
    """
    check_budget(budget, macs)
    codes, shares = codes.detach().float().cpu(), shares.double().cpu()
    target = budget * macs.dense

    def mean_macs(gates: Tensor) -> float:
        return float((shares * macs(gates)).sum())

    thresholds = torch.cat([codes.new_tensor([-torch.inf]), codes.flatten().sort().values])
    low, high = 0, len(thresholds) - 1  # the first threshold that meets the target lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        fits = mean_macs(binarize(codes, macs.space, threshold=thresholds[middle].item())) <= target
        low, high = (low, middle) if fits else (middle + 1, high)
    gates = binarize(codes, macs.space, threshold=thresholds[low].item())
    reserve = target - mean_macs(gates)
    closed = torch.where(gates.bool(), -torch.inf, codes).flatten()
    for index in closed.argsort(descending=True)[:2000].tolist():  # far more than one layer's worth of units
        if reserve < 1e-4 * target or closed[index] == -torch.inf:
            break
        trial = gates.clone()
        trial.view(-1)[index] = 1
        cost = mean_macs(trial) - mean_macs(gates)
        if cost <= reserve:
            gates, reserve = trial, reserve - cost
    return gates


def check_budget(budget: float, macs: MacsModel) -> None:
    """Raises `UserError` where `budget` is outside (0, 1] or below the smallest expert."""
    if not 0 < budget <= 1:
        raise UserError(f"--budget {budget} is not a share of the dense model's MACs; choose a number in (0, 1]")
    if budget * macs.dense < macs.floor:
        raise UserError(
            f"--budget {budget} cannot be reached: with everything prunable gone {macs.floor / macs.dense:.3f} of the MACs are left; "
            f"choose a budget in [{macs.floor / macs.dense + 0.0005:.3f}, 1]"
        )


# ---- cutting ----


class SkippedResnet(nn.Module):
    """What is left of a removed ResBlock: its input, in a decoder without the skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input_tensor[:, : self.channels]


class SkippedTransformer(nn.Module):
    """What is left of a removed Transformer: its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (hidden_states,)


def keep_channels(module: nn.Module, index: Tensor, axis: int) -> None:
    """Keep the output (axis 0) or input (axis 1) channels `index` of a linear or convolution layer, in place."""
    weight = module.weight
    module.weight = nn.Parameter(weight.detach().index_select(axis, index.to(weight.device)), weight.requires_grad)
    if axis == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[index.to(weight.device)], module.bias.requires_grad)
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    setattr(module, f"{'out' if axis == 0 else 'in'}_{kind}", len(index))


def cut_resnet(block: nn.Module, kept: Tensor) -> None:
    """Keep the groups `kept` between the two convolutions of a ResBlock."""
    per_group = block.conv2.in_channels // block.norm2.num_groups
    channels = expand(kept, per_group)
    keep_channels(block.conv1, channels, 0)
    if block.time_emb_proj is not None:
        halves = 2 if block.time_embedding_norm == "scale_shift" else 1
        keep_channels(block.time_emb_proj, torch.cat([channels + h * block.conv2.in_channels for h in range(halves)]), 0)
    norm = block.norm2
    norm.weight, norm.bias = (nn.Parameter(p.detach()[channels.to(p.device)], p.requires_grad) for p in (norm.weight, norm.bias))
    norm.num_groups, norm.num_channels = len(kept), len(channels)
    keep_channels(block.conv2, channels, 1)


def cut_attention(attention: nn.Module, kept: Tensor) -> None:
    """Keep the heads `kept` of an attention."""
    channels = expand(kept, attention.to_out[0].in_features // attention.heads)
    for projection in (attention.to_q, attention.to_k, attention.to_v):
        keep_channels(projection, channels, 0)
    keep_channels(attention.to_out[0], channels, 1)
    attention.heads = attention.sliceable_head_dim = len(kept)
    attention.inner_dim = attention.inner_kv_dim = len(channels)


def cut_feedforward(feedforward: nn.Module, kept: Tensor, units: int) -> None:
    """Keep the slices `kept` of a feed-forward layer's inner width; a gated activation has two projections to cut."""
    inner = feedforward.net[2].in_features
    channels = expand(kept, inner // units)
    projection = feedforward.net[0].proj
    halves = projection.out_features // inner
    keep_channels(projection, torch.cat([channels + h * inner for h in range(halves)]), 0)
    keep_channels(feedforward.net[2], channels, 1)


def expand(kept: Tensor, per_unit: int) -> Tensor:
    """Channel numbers of the units `kept`."""
    return (kept[:, None] * per_unit + torch.arange(per_unit)).flatten()


def check_code(code: Tensor, space: ArchSpace) -> None:
    """Raises ValueError where `code` is not a binary (D,) code with a unit left in every layer that stays."""
    if code.shape != (space.size,) or not bool(((code == 0) | (code == 1)).all()):
        raise ValueError(f"an expert needs a binary code of shape ({space.size},), got shape {tuple(code.shape)}")
    removed = [layer.name for layer in space.depth_layers if code[layer.start] == 0]
    for layer in space.width_layers:
        gone = any(layer.name == name or layer.name.startswith(name + ".") for name in removed)
        if not gone and not code[layer.span].any():
            raise ValueError(f"the code leaves nothing of {layer.name}; `gates.binarize(code, space)` keeps a unit a layer")


def cut_in_place(unet: nn.Module, space: ArchSpace, code: Tensor) -> None:
    """Remove what `code` closes from `unet`'s modules; on the meta device this gives the shapes alone."""
    check_code(code, space)
    code = code.detach().cpu()
    removed = [layer.name for layer in space.depth_layers if code[layer.start] == 0]
    for layer in space.width_layers:
        module, kept = unet.get_submodule(layer.name), code[layer.span].nonzero().flatten()
        if len(kept) == layer.units or any(layer.name == name or layer.name.startswith(name + ".") for name in removed):
            continue
        if layer.kind == "resnet":
            cut_resnet(module, kept)
        elif layer.kind == "attention":
            cut_attention(module, kept)
        else:
            cut_feedforward(module, kept, layer.units)
    for name in removed:
        module = unet.get_submodule(name)
        empty = SkippedResnet(module.out_channels) if hasattr(module, "conv2") else SkippedTransformer()
        parent, _, child = name.rpartition(".")
        unet.get_submodule(parent)[int(child)] = empty


def cut_expert(unet: nn.Module, code: Tensor, space: ArchSpace | None = None) -> UNet2DConditionModel:
    """The expert of a binary code: a smaller U-Net with its own weights and the outputs of the hard-gated one.

    Args:
        unet: the dense U-Net; gates may be attached to it, it stays as it is.
        code: gates in {0, 1}, (D,).
        space: the architecture space that `code` belongs to; `ArchSpace.from_unet(unet)` if absent.

    Returns:
        A UNet2DConditionModel in eval mode on the same device, called like the dense one.

    Raises:
        ValueError: the code is not binary, not of this U-Net, or leaves a layer without units.
    """
    expert = skeleton(unet)
    expert.load_state_dict(unet.state_dict(), assign=True)  # shares the dense weights until they are cut
    cut_in_place(expert, space or ArchSpace.from_unet(unet), code)
    for module in expert.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return expert


def save_expert(path: Path, expert: UNet2DConditionModel, code: Tensor, space: ArchSpace, meta: dict[str, Any] | None = None) -> None:
    """Write an expert as one safetensors file: its weights, its code, its U-Net's configuration and `meta`, whole or not at all."""
    config = {key: value for key, value in expert.config.items() if not key.startswith("_")}
    header = {"unet": config, "depth": space.depth, "code": code.int().tolist(), **(meta or {})}
    save_tensors(path, expert.state_dict(), header)


def load_expert(path: Path, device: torch.device | str = "cpu") -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Read an expert and the `meta` it was saved with. Raises `UserError`, naming the file, where it is missing or damaged."""
    tensors, meta = load_tensors(path)
    try:
        with torch.device("meta"):
            expert = UNet2DConditionModel.from_config(meta["unet"]).eval()
        cut_in_place(expert, ArchSpace.from_unet(expert, meta["depth"]), torch.tensor(meta["code"]))
        expert.load_state_dict(tensors, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not an expert of this project ({str(error).splitlines()[0]}); make it again with finetune.py") from None
    return expert.to(device), meta

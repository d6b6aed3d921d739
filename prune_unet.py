"""Pruning a stock diffusers U-Net: Sec. 3.3 and App. D.3, Eqs. 10-11, 23-24.

    python prune_unet.py --unet sd21 --resolution 768    # what can be pruned, and what it costs

`attach_gates` multiplies gates into a running U-Net (for training), `cut_expert` removes what a
binary code closes and gives an ordinary, smaller U-Net with the same outputs (for deployment);
`macs.py` prices a code.

| symbol | name here | shape |
|---|---|---|
| bold a = (u, v) | `a`, gates; `ArchSpace.split` gives `u` and `v` | (B, D) |
| F_l (.) v_l | `scale` on the input of the layer that reads the width | (B, C, h, w), (B, S, C) |
| u f(F) + (1 - u) F | `blend` on the output of a ResBlock or Transformer | (B, C, h, w) |

Departures from the paper, and what it leaves open:
- Where the width gates sit (Eq. 10 says "feature maps"): where a closed unit contributes exactly
  nothing, so that the expert which is cut out computes what was trained.
  ResBlock: on the input of `conv2`, after `norm2` and the nonlinearity; a unit is one of `norm2`'s
  groups, each normalised on its own. Before `norm2` a mask would not do: the norm cancels a soft
  mask's scale (next to no gradient reaches the gate) and turns a zeroed group into its bias.
  Attention: on the input of `to_out`; a unit is a head. Feed-forward: on the input of the last
  linear layer; a unit is a slice of its width.
- Training is soft throughout: Eqs. 10-11 multiply by the soft gates of Eq. 9, never by rounded
  ones. A code becomes binary once, at the end; its expert is then the hard-gated U-Net exactly.
- In a decoder, Eq. 24's F is the leading part of the ResBlock's concatenated input; a Transformer
  there reads no skip connection, so Eq. 23 holds for it on both sides.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.errors import UserError, command_line
from common.files import load_tensors, save_tensors
from common.options import read_options
from gates import ArchSpace, Layer, inside, removed_layers
from macs import skeleton

# ---- gates on a running U-Net ----


class GateHandle:
    """The hooks of `attach_gates`. Until gates are set, the U-Net computes what it did before."""

    def __init__(self, unet: UNet2DConditionModel, space: ArchSpace) -> None:
        self.space = space
        self.masks: dict[Layer, Tensor] = {}  # (B, C, 1, 1), (B, 1, C); depth: (B, 1, 1, 1)
        self.channels: dict[Layer, int] = {}
        self.hooks: list[RemovableHandle] = []
        for layer in space.width_layers:
            module, self.channels[layer] = gated_module(unet, layer)
            self.hooks.append(module.register_forward_pre_hook(partial(self.gate_width, layer)))
        for layer in space.depth_layers:
            module = unet.get_submodule(layer.name)
            self.hooks.append(module.register_forward_hook(partial(self.gate_depth, layer)))

    def set_gates(self, a: Tensor | None) -> None:
        """Use these gates, one row for each sample, in the batches that follow.

        A batch of k B samples repeats the rows k times, as classifier-free guidance repeats its
        prompts. Gradient checkpointing runs layers again in the backward pass: with it, leave the
        gates as they are until that is over.

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
            per_unit = self.channels[layer] // layer.units
            mask = v[layer.name].repeat_interleave(per_unit, dim=1)  # (B, C)
            spatial = layer.kind == "resnet"
            self.masks[layer] = mask[:, :, None, None] if spatial else mask[:, None, :]
        for layer in self.space.depth_layers:
            self.masks[layer] = u[layer.name][:, None, None, None]

    def mask(self, layer: Layer, features: Tensor) -> Tensor | None:
        """The mask of a layer for a batch like `features`, or None for the dense model."""
        mask = self.masks.get(layer)
        if mask is None:
            return None
        repeats, rest = divmod(features.shape[0], mask.shape[0])
        if rest:
            raise ValueError(
                f"a batch of {features.shape[0]} samples is no multiple of the {mask.shape[0]} "
                "codes that were set"
            )
        if repeats > 1:
            mask = mask.repeat(repeats, *[1] * (mask.ndim - 1))
        return mask.to(features)

    def gate_width(self, layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        v = self.mask(layer, inputs[0])
        return None if v is None else (scale(v, inputs[0]), *inputs[1:])

    def gate_depth(
        self, layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...], output: Any
    ) -> Any:
        u = self.mask(layer, inputs[0])
        if u is None:
            return None
        if isinstance(output, tuple):  # a Transformer2DModel called with return_dict=False
            return (blend(u, output[0], inputs[0]), *output[1:])
        return blend(u, output, inputs[0])

    def detach(self) -> None:
        """Remove every hook; the U-Net is as it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.masks = [], {}


def attach_gates(unet: UNet2DConditionModel, space: ArchSpace | None = None) -> GateHandle:
    """Attach gates to a stock U-Net through forward hooks; its weights and code stay untouched."""
    return GateHandle(unet, space or ArchSpace.from_unet(unet))


def gated_module(unet: UNet2DConditionModel, layer: Layer) -> tuple[nn.Module, int]:
    """The module that reads a width layer's features, and how many channels it reads."""
    owner = unet.get_submodule(layer.name)
    if layer.kind == "resnet":
        return owner.conv2, owner.conv2.in_channels
    linear = owner.to_out[0] if layer.kind == "attention" else owner.net[2]
    return linear, linear.in_features


def scale(v: Tensor, features: Tensor) -> Tensor:
    """F_l (.) v_l, where v_l has a unit's gate at each of the unit's channels [Eq. 10]"""
    return features * v


def blend(u: Tensor, output: Tensor, features: Tensor) -> Tensor:
    """u f(F) + (1 - u) F for a layer that may be removed [Eq. 11] [Eq. 23] [Eq. 24]

    In a decoder's ResBlock `features` is F || F_skip, of which the leading channels are F.
    """
    return u * output + (1 - u) * features[:, : output.shape[1]]


# ---- cutting ----


class SkippedResnet(nn.Module):
    """Takes a removed ResBlock's place and passes its input on, in a decoder without F_skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input_tensor[:, : self.channels]


class SkippedTransformer(nn.Module):
    """Takes a removed Transformer's place and passes its input on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (hidden_states,)


def keep_channels(module: Any, index: Tensor, axis: int) -> None:
    """Keep some output (axis 0) or input (axis 1) channels of a linear or convolution, in place."""
    index = index.to(module.weight.device)
    weight, bias = module.weight, module.bias
    module.weight = nn.Parameter(weight.detach().index_select(axis, index), weight.requires_grad)
    if axis == 0 and bias is not None:
        module.bias = nn.Parameter(bias.detach()[index], bias.requires_grad)
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    setattr(module, f"{'out' if axis == 0 else 'in'}_{kind}", len(index))


def cut_resnet(block: ResnetBlock2D, kept: Tensor) -> None:
    """Keep the groups numbered `kept`, (K,), between the two convolutions of a ResBlock."""
    norm, width = block.norm2, block.conv2.in_channels
    channels = channels_of_units(kept, width // norm.num_groups)
    keep_channels(block.conv1, channels, 0)
    if block.time_emb_proj is not None:
        parts = 2 if block.time_embedding_norm == "scale_shift" else 1
        keep_channels(block.time_emb_proj, repeat_parts(channels, width, parts), 0)
    for name in ("weight", "bias"):
        old = getattr(norm, name)
        new = nn.Parameter(old.detach()[channels.to(old.device)], old.requires_grad)
        setattr(norm, name, new)
    norm.num_groups, norm.num_channels = len(kept), len(channels)
    keep_channels(block.conv2, channels, 1)


def cut_attention(attention: Attention, kept: Tensor) -> None:
    """Keep the heads numbered `kept`, (K,), of an attention."""
    channels = channels_of_units(kept, attention.to_out[0].in_features // attention.heads)
    for projection in (attention.to_q, attention.to_k, attention.to_v):
        keep_channels(projection, channels, 0)
    keep_channels(attention.to_out[0], channels, 1)
    attention.heads = attention.sliceable_head_dim = len(kept)
    attention.inner_dim = attention.inner_kv_dim = len(channels)


def cut_feedforward(feedforward: FeedForward, kept: Tensor, units: int) -> None:
    """Keep the slices numbered `kept`, (K,), of a feed-forward's width."""
    projection, inner = feedforward.net[0].proj, feedforward.net[2].in_features
    channels = channels_of_units(kept, inner // units)
    parts = projection.out_features // inner  # 2 where the activation is gated, as in GEGLU
    keep_channels(projection, repeat_parts(channels, inner, parts), 0)
    keep_channels(feedforward.net[2], channels, 1)


def channels_of_units(kept: Tensor, per_unit: int) -> Tensor:
    """Numbers of the channels of the units `kept`, (K,) -> (K per_unit,)."""
    return (kept[:, None] * per_unit + torch.arange(per_unit)).flatten()


def repeat_parts(channels: Tensor, width: int, parts: int) -> Tensor:
    """The same channels in each part of a projection's output, (K,) -> (parts K,)."""
    return torch.cat([channels + part * width for part in range(parts)])


def check_code(code: Tensor, space: ArchSpace) -> None:
    """Raises ValueError where `code` is not binary, not (D,), or leaves nothing of a layer."""
    if code.shape != (space.size,) or not bool(((code == 0) | (code == 1)).all()):
        shape = tuple(code.shape)
        raise ValueError(f"an expert needs a binary code of shape ({space.size},), got {shape}")
    removed = removed_layers(code, space)
    for layer in space.width_layers:
        if not code[layer.span].any() and not inside(layer, removed):
            raise ValueError(
                f"the code leaves nothing of {layer.name}; "
                "`gates.binarize(code, space)` keeps a unit of each layer"
            )


def cut_in_place(unet: UNet2DConditionModel, space: ArchSpace, code: Tensor) -> None:
    """Remove what `code` closes from `unet`'s modules; on the meta device, shapes alone."""
    check_code(code, space)
    code = code.detach().cpu()
    removed = removed_layers(code, space)
    for layer in space.width_layers:
        module, kept = unet.get_submodule(layer.name), code[layer.span].nonzero().flatten()  # (K,)
        if len(kept) == layer.units or inside(layer, removed):
            continue
        if layer.kind == "resnet":
            cut_resnet(module, kept)
        elif layer.kind == "attention":
            cut_attention(module, kept)
        else:
            cut_feedforward(module, kept, layer.units)
    for name in removed:
        module = unet.get_submodule(name)
        is_resnet = isinstance(module, ResnetBlock2D)
        empty = SkippedResnet(module.out_channels) if is_resnet else SkippedTransformer()
        parent, _, child = name.rpartition(".")
        unet.get_submodule(parent)[int(child)] = empty


def cut_expert(
    unet: UNet2DConditionModel, code: Tensor, space: ArchSpace | None = None
) -> UNet2DConditionModel:
    """The expert of a binary code: a smaller U-Net that computes what the hard-gated one does.

    Args:
        unet: the dense U-Net; gates may be attached to it, it stays as it is.
        code: gates in {0, 1}, (D,).
        space: the architecture space of `code`; `ArchSpace.from_unet(unet)` if absent.

    Returns:
        A UNet2DConditionModel with weights of its own, in eval mode on the same device, called like
        the dense one.

    Raises:
        ValueError: the code is not binary, not of this U-Net, or leaves a layer without units.
    """
    expert = skeleton(unet)
    expert.load_state_dict(unet.state_dict(), assign=True)  # shared with `unet` until they are cut
    cut_in_place(expert, space or ArchSpace.from_unet(unet), code)
    for module in expert.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return expert


# ---- experts as files ----


def save_expert(
    path: Path,
    expert: UNet2DConditionModel,
    code: Tensor,
    space: ArchSpace,
    meta: dict[str, Any] | None = None,
) -> None:
    """Write an expert as one safetensors file, whole or not at all.

    Its header holds the code, the dense U-Net's configuration, and `meta`.
    """
    config = {key: value for key, value in expert.config.items() if not key.startswith("_")}
    header = {"unet": config, "depth": space.depth, "code": code.int().tolist(), **(meta or {})}
    save_tensors(path, expert.state_dict(), header)


def load_expert(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Read an expert and the header it was saved with: `unet`, `depth`, `code` and its `meta`.

    Raises:
        UserError: the file, which it names, is missing, cut short, altered or no expert.
    """
    tensors, header = load_tensors(path)
    if not {"unet", "depth", "code"} <= header.keys():
        raise UserError(f"{path} is not an expert; make one with finetune.py")
    try:
        with torch.device("meta"):
            expert = UNet2DConditionModel.from_config(header["unet"]).eval()
        space = ArchSpace.from_unet(expert, header["depth"])
        cut_in_place(expert, space, torch.tensor(header["code"]))
        expert.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not an expert ({reason}); make one with finetune.py") from None
    return expert.to(device), header


def main() -> None:
    from plan import Table, describe, print_table

    cfg = read_options(Table, __doc__)
    found = describe(cfg.unet, cfg.resolution, cfg.text_tokens, cfg.depth)
    print(json.dumps(found)) if cfg.json else print_table(found)


if __name__ == "__main__":
    command_line(main)

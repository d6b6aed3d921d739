"""Pruning a stock diffusers U-Net: Sec. 3.3 and App. D.3, Eqs. 10-11, 23-24.

This is all that knows the U-Net's classes. `find_units` lists what can be pruned, `attach_gates`
multiplies gates into a running U-Net (for training), `cut_expert` removes what a binary code closes
and gives an ordinary, smaller U-Net with the same outputs (for deployment).

| symbol | name here | shape |
|---|---|---|
| bold a = (u, v) | `a`, gates; `ArchSpace.split` gives `u` and `v` | (B, D) |
| F_l (.) v_l | `scale` on the input of the layer that reads the width | (B, C, h, w), (B, S, C) |
| u f(F) + (1 - u) F | `blend` on the output of a ResBlock or Transformer | (B, C, h, w) |

A width gate sits where a closed unit contributes exactly nothing: on the input of `conv2`, after
`norm2` and the nonlinearity (a unit is one of `norm2`'s groups), of an attention's `to_out` (a
head), of a feed-forward's last linear layer (a slice). Before `norm2` it would not do: the norm
cancels a soft gate's scale and turns a closed group into its bias.
What differs from the paper: docs/departures.md#prune_unet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from common.errors import UserError
from common.files import load_tensors, save_tensors
from gates import ArchSpace, Layer, inside, removed_layers

FEEDFORWARD_SLICES = 32
DEPTHS = ("paper", "all", "none")


# ---- what can be pruned ----


def find_units(unet: UNet2DConditionModel, depth: str = "paper") -> ArchSpace:
    """The prunable units of a U-Net, found by module type (App. D.1, D.3).

    All width units come first, in module order, then the depth units.

    Args:
        unet: any device, the meta device included.
        depth: which layers may be removed whole. `paper`: the last ResBlock and the last
            Transformer of each down and up block, where input and output shapes agree; `all`:
            every ResBlock and Transformer where they agree; `none`.

    Raises:
        ValueError: unknown `depth`.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {', '.join(DEPTHS)}, got {depth!r}")
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
    return ArchSpace(tuple(layers), depth)


def removable_layers(unet: UNet2DConditionModel, depth: str) -> list[str]:
    """Names of the ResBlocks and Transformers that a depth unit may remove, in module order."""
    chosen: list[str] = []
    # channels that enter the next ResBlock; those of a skip connection are not counted
    channels = unet.conv_in.out_channels
    for path, block in blocks_of(unet).items():
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


def blocks_of(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The down, middle and up blocks by path, in the order of computation."""
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {"mid_block": unet.mid_block}
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    return {path: block for path, block in blocks.items() if block is not None}


class BlockRecorder:
    """Keeps the outputs of a U-Net's down, middle and up blocks, for Eq. 28."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.outputs: list[Tensor] = []
        self.hooks = [block.register_forward_hook(self.keep) for block in blocks_of(unet).values()]

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # a down block also gives its skip connections
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        """The outputs since the last call, in the order of computation; forgets them."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def detach(self) -> None:
        """Remove the hooks and forget the outputs."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.outputs = [], []


# ---- shapes without weights ----


def meta_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net of the same configuration on the meta device: shapes without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(unet.config).eval()


def example_inputs(
    unet: UNet2DConditionModel,
    latent_size: int,
    text_tokens: int,
    device: str | torch.device = "meta",
    batch: int = 1,
) -> dict[str, Any]:
    """Keyword arguments of one forward of `batch` images."""
    config = unet.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    size = (batch, config.in_channels, latent_size, latent_size)
    inputs: dict[str, Any] = {
        "sample": torch.zeros(size, device=device),
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(batch, text_tokens, width, device=device),
    }
    if config.addition_embed_type == "text_time":  # SDXL: pooled text and six sizes
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(batch, pooled, device=device),
            "time_ids": torch.zeros(batch, 6, device=device),
        }
    return inputs


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
    return GateHandle(unet, space or find_units(unet))


def gated_path(layer: Layer) -> str:
    """The path of the module that reads a width layer's features."""
    inner = {"resnet": "conv2", "attention": "to_out.0", "feedforward": "net.2"}
    return f"{layer.name}.{inner[layer.kind]}"


def gated_module(unet: UNet2DConditionModel, layer: Layer) -> tuple[nn.Module, int]:
    """The module that reads a width layer's features, and how many channels it reads."""
    module = unet.get_submodule(gated_path(layer))
    return module, module.in_channels if layer.kind == "resnet" else module.in_features


def stream_module(unet: UNet2DConditionModel, layer: Layer) -> nn.Module:
    """The module whose input is the residual stream that a width layer's branch is added to.

    A ResBlock's input still goes through its shortcut, where it has one.
    """
    owner = unet.get_submodule(layer.name)
    if layer.kind == "resnet" or getattr(owner, "residual_connection", False):
        return owner
    block, _, branch = layer.name.rpartition(".")
    norm = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}[branch]
    return unet.get_submodule(f"{block}.{norm}")


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


def cut_layer(module: Any, layer: Layer, kept: Tensor) -> None:
    """Keep the units numbered `kept`, (K,), of a width layer's module, in place."""
    if len(kept) == layer.units:
        return
    if layer.kind == "resnet":
        cut_resnet(module, kept)
    elif layer.kind == "attention":
        cut_attention(module, kept)
    else:
        cut_feedforward(module, kept, layer.units)


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
        if not inside(layer, removed):
            kept = code[layer.span].nonzero().flatten()  # (K,)
            cut_layer(unet.get_submodule(layer.name), layer, kept)
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
        space: the architecture space of `code`; `find_units(unet)` if absent.

    Returns:
        A UNet2DConditionModel with weights of its own, in eval mode on the same device, called like
        the dense one.

    Raises:
        ValueError: the code is not binary, not of this U-Net, or leaves a layer without units.
    """
    expert = meta_copy(unet)
    expert.load_state_dict(unet.state_dict(), assign=True)  # shared with `unet` until they are cut
    cut_in_place(expert, space or find_units(unet), code)
    for module in expert.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return expert


# ---- experts as files ----


def save_expert(
    path: Path,
    tensors: dict[str, Tensor],
    config: Any,
    code: Tensor,
    space: ArchSpace,
    meta: dict[str, Any] | None = None,
) -> None:
    """Write an expert as one safetensors file, whole or not at all.

    Its header holds the code, the dense U-Net's configuration, and `meta`.

    Args:
        tensors: of its `state_dict`, all or those that are not the teacher's.
        config: of the dense U-Net.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    header = {"unet": config, "depth": space.depth, "code": code.int().tolist(), **(meta or {})}
    save_tensors(path, tensors, header)


def load_expert(
    path: Path, device: torch.device | str = "cpu", dense: UNet2DConditionModel | None = None
) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Read an expert and the header it was saved with: `unet`, `depth`, `code` and its `meta`.

    Args:
        dense: the teacher's U-Net, which the weights that the file lacks are cut out of.

    Raises:
        UserError: the file, which it names, is missing, cut short, altered or no expert.
    """
    tensors, header = load_tensors(path)
    if not {"unet", "depth", "code"} <= header.keys():
        raise UserError(f"{path} is not an expert; make one with finetune.py")
    try:
        code = torch.tensor(header["code"])
        with torch.device("meta"):
            expert = UNet2DConditionModel.from_config(header["unet"]).eval()
        space = find_units(expert, header["depth"])
        cut_in_place(expert, space, code)
        if dense is not None and not expert.state_dict().keys() <= tensors.keys():
            tensors = cut_expert(dense, code, space).state_dict() | tensors
        expert.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not an expert ({reason}); make one with finetune.py") from None
    return expert.to(device), header

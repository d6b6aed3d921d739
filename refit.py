"""Refitting: what is left after cutting is solved anew in closed form. Ours, not the paper's.

A cut expert computes something else than its teacher, because units are gone. Much of that can be
made up for by the layers that read pruned features: W of `conv2`, `to_out` and a feed-forward's
last linear layer. Each is a ridge regression from the features that are left to what the teacher's
residual stream is after this branch, so it also makes up for what earlier layers have spoilt:

    W = argmin ||W X - R||^2 + lambda ||W - W_cut||^2,    R = (stream + branch of the teacher)
                                                              - stream of the expert - bias

Teacher and expert run side by side, as the two halves of one batch through the gated U-Net. Layers
are solved in the order of computation, each as soon as that one forward reaches it, so that later
layers see what refitted earlier ones put out. No gradient is needed.

| symbol | name here | shape |
|---|---|---|
| X | `x`: features of kept units, patches of a convolution | (rows, K) |
| R | `target` | (rows, O) |
| W, W_cut | `new`, `old` | (O, K) |
| lambda | `ridge` times the mean diagonal of X^T X | scalar |

Why it is here, and what it gives: docs/departures.md#refit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gates import ArchSpace, Layer, inside, removed_layers
from prune_unet import attach_gates, channels_of_units, gated_module, gated_path, stream_module

HELD_OUT = 8  # one in so many images is not fitted to, but shows whether a layer gains
CHUNK = 2**25  # numbers of X in memory at once


class Fit(NamedTuple):
    """How well a layer hits its target on held-out images: |W X - R|^2 / |R|^2."""

    layer: str
    before: float
    after: float

    @property
    def gains(self) -> bool:
        return self.after < self.before  # False where the solution is not finite


@torch.no_grad()
def refit(
    unet: UNet2DConditionModel,
    space: ArchSpace,
    code: Tensor,
    inputs: dict[str, Any],
    ridge: float = 0.1,
) -> tuple[dict[str, Tensor], list[Fit]]:
    """Solve the layers of an expert that read pruned features.

    A layer that does not gain on held-out images, or whose solution is not finite, keeps its cut
    weights.

    Args:
        unet: the teacher's U-Net, which stays as it is.
        code: binary code of the expert, (D,).
        inputs: keyword arguments of a forward of n images, at random timesteps.
        ridge: lambda, as a share of the mean diagonal of X^T X.

    Returns:
        New weights, by the names that they have in the expert's `state_dict`, and each layer's fit.
    """
    run = Refitting(unet, space, code, ridge)
    try:
        n = len(inputs["sample"])
        gates = torch.ones(2 * n, space.size, device=inputs["sample"].device)
        gates[n:] = code.to(gates)
        run.gates.set_gates(gates)
        unet(**doubled(inputs, unet.dtype))
    finally:
        run.detach()
    return run.weights, run.fits


def doubled(inputs: Any, dtype: torch.dtype) -> Any:
    """Tensors, in dictionaries of any depth, twice along the batch; floats in `dtype`."""
    if isinstance(inputs, dict):
        return {name: doubled(value, dtype) for name, value in inputs.items()}
    twice = torch.cat([inputs, inputs])
    return twice.to(dtype) if twice.is_floating_point() else twice


class Refitting:
    """The hooks of one refit: each solves its layer when the forward reaches it."""

    def __init__(
        self, unet: UNet2DConditionModel, space: ArchSpace, code: Tensor, ridge: float
    ) -> None:
        self.unet, self.ridge = unet, ridge
        self.gates = attach_gates(unet, space)
        self.streams: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.fits: list[Fit] = []
        self.hooks = []
        removed = removed_layers(code, space)
        for layer in space.width_layers:
            if inside(layer, removed):
                continue
            module, width = gated_module(unet, layer)
            units = code[layer.span].cpu().nonzero().flatten()
            kept = channels_of_units(units, width // layer.units).to(unet.device)
            stream, solve = partial(self.keep_stream, layer), partial(self.solve, layer, kept)
            self.hooks += [
                stream_module(unet, layer).register_forward_pre_hook(stream),
                module.register_forward_hook(solve),
            ]
        self.progress = tqdm(total=len(self.hooks) // 2, desc="refitting", unit="layer")

    def detach(self) -> None:
        self.progress.close()
        for hook in self.hooks:
            hook.remove()
        self.gates.detach()

    def keep_stream(self, layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.streams[layer.name] = inputs[0]

    def solve(
        self, layer: Layer, kept: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Refit the layer, and give what teacher and expert put out from here on."""
        stream = self.streams.pop(layer.name)
        shortcut = getattr(self.unet.get_submodule(layer.name), "conv_shortcut", None)
        if shortcut is not None:
            stream = shortcut(stream)
        if stream.ndim > output.ndim:  # an attention outside Transformers makes tokens of its input
            stream = stream.flatten(2).transpose(1, 2)
        teacher, expert = output.chunk(2)
        features = inputs[0].chunk(2)[1].index_select(1 if output.ndim == 4 else -1, kept)
        # what the expert's W x is to become: all of the teacher's stream that is not there yet
        missing = teacher + stream.chunk(2)[0] - stream.chunk(2)[1]
        if module.bias is not None:
            missing = missing - (module.bias[:, None, None] if output.ndim == 4 else module.bias)
        old = module.weight.index_select(1, kept)  # (O, K) or (O, K / 9, 3, 3)
        new, fit = solved(module, features, missing, old, self.ridge)
        self.fits.append(Fit(layer.name, *fit))
        self.progress.update()
        if not self.fits[-1].gains:
            return output
        self.weights[f"{gated_path(layer)}.weight"] = new
        change = (new - old.float()).to(features.dtype)
        if output.ndim == 4:
            more = F.conv2d(features, change, None, module.stride, module.padding)
        else:
            more = F.linear(features, change)
        return torch.cat([teacher, expert + more])


def solving_dtype(device: torch.device) -> torch.dtype:
    """Of Gram matrices and what is solved with them: float64 where that is not slow."""
    return torch.float64 if device.type == "cpu" else torch.float32


def rows_of(module: Any, features: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """X, (rows, K), and R, (rows, O), of some images at a time, in the precision of the solving."""
    dtype = solving_dtype(features.device)
    patches = 9 if features.ndim == 4 else 1
    at_once = max(1, CHUNK // (patches * features[0].numel()))
    for x, r in zip(features.split(at_once), target.split(at_once), strict=True):
        if x.ndim == 4:
            x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
            x, r = x.transpose(1, 2), r.flatten(2).transpose(1, 2)  # (n, hw, 9 C), (n, hw, O)
        yield x.flatten(0, -2).to(dtype), r.flatten(0, -2).to(dtype)


def solved(
    module: Any, features: Tensor, target: Tensor, old: Tensor, ridge: float
) -> tuple[Tensor, tuple[float, float]]:
    """The ridge regression's weights, as `old` in shape and float32, and the errors before, after.

    Args:
        module: the convolution or linear layer.
        features: its input of n images, of kept channels.
        target: R, as its output in shape.
        old: its weights for kept channels.
    """
    held = len(features) // HELD_OUT
    fitted = slice(held, None) if held else slice(None)
    XX = XR = torch.zeros((), device=features.device)
    for x, r in rows_of(module, features[fitted], target[fitted]):
        XX, XR = XX + x.T @ x, XR + x.T @ r  # (K, K), (K, O)
    W = old.flatten(1).to(XX)  # (O, K)
    weight = ridge * XX.diagonal().mean()
    XX.diagonal().add_(weight)
    factor, failed = torch.linalg.cholesky_ex(XX)
    new = torch.cholesky_solve(XR + weight * W.T, factor).T  # (O, K)
    if failed:
        new = torch.full_like(W, torch.nan)
    errors = torch.zeros(3).to(XX)
    shown = slice(held) if held else slice(None)
    for x, r in rows_of(module, features[shown], target[shown]):
        parts = (x @ W.T - r, x @ new.T - r, r)
        errors += torch.stack([part.square().sum() for part in parts])
    before, after = (errors[:2] / errors[2].clamp(min=1e-30)).tolist()
    return new.float().view(old.shape), (before, after)

"""Refitting: what is left after cutting is solved anew in closed form. Ours, not the paper's.

A cut expert computes something else than its teacher, because units are gone. Much of that can be
made up for by the layers that read pruned features: W of `conv2`, `to_out` and a feed-forward's
last linear layer. Each is a ridge regression from the features that are left to what the teacher's
residual stream is after this branch, so it also makes up for what earlier layers have spoilt:

    W = argmin ||W X - R||^2 + lambda ||W - W_cut||^2,    R = (stream + branch of the teacher)
                                                              - stream of the expert - bias

Teacher and expert run side by side through the gated U-Net: a batch has each image twice, first for
the teacher, then for the expert. Layers are solved in the order of computation, each as soon as the
one forward reaches it, so that later layers see what refitted earlier ones put out. No gradient is
needed. The images go forward in batches, which wait at each layer until all have been added to its
X^T X and X^T R. What is kept of a waiting batch is its residual stream, its skip connections and
the layer's input and output; what a layer computes in between is kept of one batch alone.

| symbol | name here | shape |
|---|---|---|
| X | `x`: features of kept units, patches of a convolution | (rows, K) |
| R | `target` | (rows, O) |
| W, W_cut | `new`, `old` | (O, K) |
| lambda | `ridge` times the mean diagonal of X^T X | scalar |

Why it is here, and what it gives: docs/departures.md#refit.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from common.turns import Pause, in_turns
from gates import ArchSpace, Layer, inside, removed_layers
from prune_unet import attach_gates, channels_of_units, gated_module, gated_path, stream_module

HELD_OUT = 8  # one in so many images is not fitted to, but shows whether a layer gains


class Fit(NamedTuple):
    """How well a layer hits its target on held-out images: |W X - R|^2 / |R|^2."""

    layer: str
    before: float
    after: float

    @property
    def gains(self) -> bool:
        return self.after < self.before  # False where the solution is not finite


def refit(
    unet: UNet2DConditionModel,
    space: ArchSpace,
    code: Tensor,
    inputs: dict[str, Any],
    ridge: float = 0.1,
    micro_batch: int = 32,
) -> tuple[dict[str, Tensor], list[Fit]]:
    """Solve the layers of an expert that read pruned features.

    A layer that does not gain on held-out images, or whose solution is not finite, keeps its cut
    weights.

    Args:
        unet: the teacher's U-Net, which stays as it is.
        code: binary code of the expert, (D,).
        inputs: keyword arguments of a forward of n images, at random timesteps.
        ridge: lambda, as a share of the mean diagonal of X^T X.
        micro_batch: images that go forward together; without effect on the result.

    Returns:
        New weights, by the names that they have in the expert's `state_dict`, and each layer's fit.
    """
    rows = torch.arange(len(inputs["sample"]))
    held_out = rows % HELD_OUT == HELD_OUT - 1
    batches = rows.split(micro_batch)
    run = Refitting(unet, space, code, ridge)

    @torch.no_grad()  # which holds in the thread that sets it
    def forward(i: int, pause: Pause) -> None:
        run.here.pause, run.here.is_first = pause, i == 0
        run.here.held_out = held_out[batches[i]].to(unet.device)
        # too few images to hold any out: all of them show whether a layer gains
        run.here.shown = run.here.held_out if held_out.any() else ~run.here.held_out
        unet(**doubled(inputs, batches[i].to(unet.device), unet.dtype))

    try:
        in_turns(forward, len(batches))
    finally:
        run.detach()
    return run.weights, run.fits


def doubled(inputs: Any, rows: Tensor, dtype: torch.dtype) -> Any:
    """Rows of tensors, in dictionaries of any depth, each twice in turn; floats in `dtype`."""
    if isinstance(inputs, dict):
        return {name: doubled(value, rows, dtype) for name, value in inputs.items()}
    twice = inputs[rows].repeat_interleave(2, dim=0)
    return twice.to(dtype) if twice.is_floating_point() else twice


class Refitting:
    """The hooks of one refit: each solves its layer when all batches have come to it.

    `here` is the state of the batch whose turn it is: its `pause`, whether it `is_first`, which of
    its images are `held_out` and which are `shown` what a layer gains, and its residual `stream`.
    """

    def __init__(
        self, unet: UNet2DConditionModel, space: ArchSpace, code: Tensor, ridge: float
    ) -> None:
        self.unet, self.ridge = unet, ridge
        self.here = threading.local()
        self.weights: dict[str, Tensor] = {}
        self.fits: list[Fit] = []
        self.gates = attach_gates(unet, space)
        self.gates.set_gates(torch.stack([torch.ones_like(code), code]).to(unet.device))
        self.hooks = []
        removed = removed_layers(code, space)
        for layer in space.width_layers:
            if inside(layer, removed):
                continue
            module, width = gated_module(unet, layer)
            units = code[layer.span].cpu().nonzero().flatten()
            kept = channels_of_units(units, width // layer.units).to(unet.device)
            self.hooks += [
                stream_module(unet, layer).register_forward_pre_hook(self.keep_stream),
                module.register_forward_hook(partial(self.solve, layer, kept)),
            ]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.gates.detach()

    def keep_stream(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.here.stream = inputs[0]

    def missing(self, layer: Layer, module: Any, output: Tensor) -> Tensor:
        """R: all of the teacher's stream after the branch that the expert's has not got yet."""
        stream = self.here.stream
        del self.here.stream
        shortcut = getattr(self.unet.get_submodule(layer.name), "conv_shortcut", None)
        if shortcut is not None:
            stream = shortcut(stream)
        if stream.ndim > output.ndim:  # an attention outside Transformers makes tokens of its input
            stream = stream.flatten(2).transpose(1, 2)
        missing = output[::2] + stream[::2] - stream[1::2]
        if module.bias is None:
            return missing
        return missing - (module.bias[:, None, None] if output.ndim == 4 else module.bias)

    def solve(
        self, layer: Layer, kept: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Refit the layer, and give what teacher and expert put out from here on."""
        here, old = self.here, module.weight.index_select(1, kept)  # (O, K) or (O, K / 9, 3, 3)
        features = inputs[0][1::2].index_select(1 if output.ndim == 4 else -1, kept)
        target = self.missing(layer, module, output)
        if here.is_first:
            self.regression = Regression(old, self.ridge)
        regression = self.regression
        fitted, shown = ~here.held_out, here.shown
        regression.add(*rows_of(module, features[fitted], target[fitted]))
        features, target = features[shown], target[shown]
        here.pause()
        if here.is_first:
            regression.solve()
        regression.compare(*rows_of(module, features, target))
        here.pause()
        fit = Fit(layer.name, *regression.errors())
        new = regression.new.float().view(old.shape)
        if here.is_first:
            self.fits.append(fit)
            if fit.gains:
                self.weights[f"{gated_path(layer)}.weight"] = new
        if fit.gains:
            features = inputs[0][1::2].index_select(1 if output.ndim == 4 else -1, kept)
            change = (new - old.float()).to(features.dtype)
            if output.ndim == 4:
                more = F.conv2d(features, change, None, module.stride, module.padding)
            else:
                more = F.linear(features, change)
            output[1::2] += more
        return output


def rows_of(module: Any, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """X, (rows, K), and R, (rows, O), of a layer's input and target."""
    if x.ndim == 4:
        x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
        x, r = x.transpose(1, 2), r.flatten(2).transpose(1, 2)  # (n, hw, 9 C), (n, hw, O)
    return x.flatten(0, -2), r.flatten(0, -2)


class Regression:
    """The ridge regression of one layer, from sums over its rows.

    Args:
        old: weights for kept channels, (O, K) or (O, K / 9, 3, 3).
    """

    def __init__(self, old: Tensor, ridge: float) -> None:
        self.dtype = torch.float64 if old.device.type == "cpu" else torch.float32
        self.ridge, self.old = ridge, old.flatten(1).to(self.dtype)  # (O, K)
        K = self.old.shape[1]
        self.XX, self.XR = self.old.new_zeros(K, K), torch.zeros_like(self.old.T)
        self.squares = self.old.new_zeros(3)  # |W_cut X - R|^2, |W X - R|^2, |R|^2

    def add(self, x: Tensor, r: Tensor) -> None:
        """Fit to rows, (rows, K), and their targets, (rows, O), too."""
        x, r = x.to(self.dtype), r.to(self.dtype)
        self.XX.addmm_(x.T, x)
        self.XR.addmm_(x.T, r)

    def solve(self) -> None:
        weight = self.ridge * self.XX.diagonal().mean()
        self.XX.diagonal().add_(weight)
        factor, failed = torch.linalg.cholesky_ex(self.XX)
        self.new = torch.cholesky_solve(self.XR + weight * self.old.T, factor).T  # (O, K)
        if failed:
            self.new = torch.full_like(self.old, torch.nan)

    def compare(self, x: Tensor, r: Tensor) -> None:
        """Count in the errors on held-out rows, (rows, K), with targets (rows, O)."""
        x, r = x.to(self.dtype), r.to(self.dtype)
        parts = (x @ self.old.T - r, x @ self.new.T - r, r)
        self.squares += torch.stack([part.square().sum() for part in parts])

    def errors(self) -> tuple[float, float]:
        """Before and after, relative to the targets."""
        before, after = (self.squares[:2] / self.squares[2].clamp(min=1e-30)).tolist()
        return before, after

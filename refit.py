"""Refitting: what is left after cutting is solved anew in closed form. Ours, not the paper's.

A cut expert computes something else than its teacher, because units are gone. Much of that can be
made up for by the layers that read pruned features: W of `conv2`, `to_out` and a feed-forward's
last linear layer. Each is a ridge regression from the features that are left to what the teacher's
residual stream is after this branch, so it also makes up for what earlier layers have spoilt:

    W = argmin ||W X - R||^2 + lambda ||W - W_cut||^2,    R = (stream + branch of the teacher)
                                                              - stream of the expert - bias

Each image runs twice, as the teacher's and as the expert's, in one batch through the gated U-Net.
Layers are solved in the order of computation, each as soon as the forwards of all batches have come
to it, so that later layers see what refitted earlier ones put out. No gradient is needed, and one
forward of each batch is enough.

| symbol | name here | shape |
|---|---|---|
| X | `x`: features of kept units, patches of a convolution | (rows, K) |
| R | `target` | (rows, O) |
| W, W_cut | `new`, `old` | (O, K) |
| lambda | `ridge` times the mean diagonal of X^T X | scalar |

Why it is here, and what it gives: docs/departures.md#refit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Semaphore
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gates import ArchSpace, Layer, inside, removed_layers
from prune_unet import attach_gates, channels_of_units, gated_module, gated_path, stream_module

AT_ONCE = 32  # images that are in the U-Net, while the others wait at a layer
MOST_BATCHES = 16  # since a thread of the CPU has buffers of its own
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
    n = len(inputs["sample"])
    batches = torch.arange(n).split(max(AT_ONCE, math.ceil(n / MOST_BATCHES)))
    turns = Turns(len(batches))
    held = [int((batch < n // HELD_OUT).sum()) for batch in batches]
    run = Refitting(unet, space, code, ridge, held, turns)
    try:
        turns.run(lambda batch: unet(**twice(inputs, batches[batch], unet.dtype)))
    finally:
        run.detach()
    return run.weights, run.fits


def twice(inputs: Any, rows: Tensor, dtype: torch.dtype) -> Any:
    """Each of some rows of tensors, in dictionaries of any depth, twice; floats in `dtype`."""
    if isinstance(inputs, dict):
        return {name: twice(value, rows, dtype) for name, value in inputs.items()}
    found = inputs[rows.to(inputs.device)].repeat_interleave(2, 0)
    return found.to(dtype) if found.is_floating_point() else found


class Turns:
    """Several runs of the same work, one at a time, that wait for each other where they `meet`.

    Each has a thread, since a forward cannot be left and entered again otherwise. Their order is
    always the same, so sums over batches are too.
    """

    def __init__(self, count: int) -> None:
        self.count, self.current, self.stopped = count, 0, False
        self.may_run = [Semaphore(0) for _ in range(count)]

    def run(self, work: Callable[[int], None]) -> None:
        """Call `work` with 0 to `count - 1`. An error in one ends all, and is raised."""

        def in_turn(number: int) -> None:
            try:
                self.wait(number)
                with torch.no_grad():  # which is a thread's own
                    work(number)
                self.may_run[(number + 1) % self.count].release()
            except BaseException:
                self.stop()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(in_turn, number) for number in range(self.count)]
            self.may_run[0].release()
            try:
                errors = [future.exception() for future in futures]
            except BaseException:  # Ctrl-C
                self.stop()
                raise
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, Stopped)):
            raise error

    def meet(self, work: Callable[[], None]) -> None:
        """Go on when all have come here; the last one does `work` before the first goes on."""
        number, following = self.current, (self.current + 1) % self.count
        if not following:
            work()
        self.may_run[following].release()
        self.wait(number)

    def wait(self, number: int) -> None:
        self.may_run[number].acquire()
        if self.stopped:
            raise Stopped
        self.current = number

    def stop(self) -> None:
        self.stopped = True
        for semaphore in self.may_run:
            semaphore.release()


class Stopped(Exception):
    """Another run has failed."""


class Refitting:
    """The hooks of one refit: each solves its layer when all forwards have reached it."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        space: ArchSpace,
        code: Tensor,
        ridge: float,
        held: list[int],  # of each batch, how many images are held out
        turns: Turns,
    ) -> None:
        self.unet, self.ridge, self.held, self.turns = unet, ridge, held, turns
        self.gates = attach_gates(unet, space)
        self.gates.set_gates(torch.stack([torch.ones_like(code), code]).to(unet.device).float())
        self.streams: dict[tuple[str, int], Tensor] = {}  # by layer and batch
        self.sums = Sums(), Sums()  # of the layer that batches come to; fitted, held out
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
        for hook in self.hooks:
            hook.remove()
        self.gates.detach()
        self.progress.close()

    def keep_stream(self, layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.streams[layer.name, self.turns.current] = inputs[0]

    def solve(
        self, layer: Layer, kept: Tensor, module: Any, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Refit the layer with all other batches, and give what comes out from here on."""
        name = f"{gated_path(layer)}.weight"
        old = module.weight.index_select(1, kept)  # (O, K) or (O, K / 9, 3, 3)
        self.add(layer, kept, module, inputs[0], output)

        def regression() -> None:
            new, fit = solved(*self.sums, old, self.ridge)
            self.sums = Sums(), Sums()
            self.fits.append(Fit(layer.name, *fit))
            self.progress.update()
            if self.fits[-1].gains:
                self.weights[name] = new

        self.turns.meet(regression)
        if name not in self.weights:
            return output
        features = expert_features(inputs[0], kept)
        change = (self.weights[name] - old.float()).to(features.dtype)
        if output.ndim == 4:
            more = F.conv2d(features, change, None, module.stride, module.padding)
        else:
            more = F.linear(features, change)
        return torch.stack([output[0::2], output[1::2] + more], 1).flatten(0, 1)

    def add(
        self, layer: Layer, kept: Tensor, module: Any, features: Tensor, output: Tensor
    ) -> None:
        """Add a batch to the sums of the layer. What is made for that is gone while others run."""
        batch = self.turns.current
        stream = self.streams.pop((layer.name, batch))
        shortcut = getattr(self.unet.get_submodule(layer.name), "conv_shortcut", None)
        if shortcut is not None:
            stream = shortcut(stream)
        if stream.ndim > output.ndim:  # an attention outside Transformers makes tokens of its input
            stream = stream.flatten(2).transpose(1, 2)
        # what the expert's W x is to become: all of the teacher's stream that is not there yet
        missing = output[0::2] + stream[0::2] - stream[1::2]
        if module.bias is not None:
            missing = missing - (module.bias[:, None, None] if output.ndim == 4 else module.bias)
        features = expert_features(features, kept)
        held = self.held[batch]
        self.sums[0].add(module, features[held:], missing[held:])
        self.sums[1].add(module, features[:held], missing[:held])


def expert_features(features: Tensor, kept: Tensor) -> Tensor:
    """The kept channels of a layer's input, of the expert's half."""
    return features[1::2].index_select(1 if features.ndim == 4 else -1, kept)


class Sums:
    """X^T X, (K, K), X^T R, (K, O), and |R|^2 of a layer's rows."""

    def __init__(self) -> None:
        self.XX, self.XR, self.RR = torch.zeros(3).unbind()

    def add(self, module: Any, features: Tensor, target: Tensor) -> None:
        """Add those of some images.

        Args:
            module: the convolution or linear layer.
            features: its input, of kept channels.
            target: R, as its output in shape.
        """
        if not len(features):
            return
        dtype = torch.float64 if features.device.type == "cpu" else torch.float32
        patches = 9 if features.ndim == 4 else 1
        at_once = max(1, CHUNK // (patches * features[0].numel()))
        for x, r in zip(features.split(at_once), target.split(at_once), strict=True):
            if x.ndim == 4:
                x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
                x, r = x.transpose(1, 2), r.flatten(2).transpose(1, 2)  # (n, hw, 9 C), (n, hw, O)
            X, R = x.flatten(0, -2).to(dtype), r.flatten(0, -2).to(dtype)
            self.XX, self.XR = self.XX.to(X) + X.T @ X, self.XR.to(X) + X.T @ R
            self.RR = self.RR.to(X) + R.square().sum()

    def error(self, W: Tensor) -> float:
        """|W X - R|^2 / |R|^2 of weights, (O, K)."""
        rest = ((W @ self.XX - 2 * self.XR.T) * W).sum() + self.RR
        return (rest / self.RR.clamp(min=1e-30)).item()


def solved(
    fitted: Sums, held: Sums, old: Tensor, ridge: float
) -> tuple[Tensor, tuple[float, float]]:
    """The ridge regression's weights, as `old` in shape and float32, and the errors before, after.

    Args:
        fitted: of the rows that are fitted to.
        held: of those that show the error; without any, it is that of the others.
        old: the layer's weights for kept channels.
    """
    W = old.flatten(1).to(fitted.XX)  # (O, K)
    weight = ridge * fitted.XX.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(fitted.XX + weight * torch.eye(len(W.T)).to(W))
    new = torch.cholesky_solve(fitted.XR + weight * W.T, factor).T  # (O, K)
    if failed:
        new = torch.full_like(W, torch.nan)
    shown = held if held.RR else fitted
    return new.float().view(old.shape), (shown.error(W), shown.error(new))

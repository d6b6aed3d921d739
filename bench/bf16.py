"""Runs a script with bf16 products computed in float32, a layer at a time.

    python -m bench.bf16 train.py --precision bf16 ...

Where a CPU has no bf16 instructions, PyTorch's convolutions and linear layers in bf16 are sixty
times slower than those in float32. Weights, activations and gradients stay bf16 here, so memory is
what it is on a CPU that has them, but for one layer's weights in float32.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class InFloat32(torch.autograd.Function):
    """`operation(x, weight, bias)` of bf16 tensors; only `x` has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operation: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(weight)  # as stock layers do: for a frozen one x is not needed
        ctx.shape, ctx.operation = x.shape, operation
        bias = None if bias is None else bias.float()
        return operation(x.float(), weight.float(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        with torch.enable_grad():  # a linear operation: any x has the same gradient
            x = torch.zeros(ctx.shape, device=weight.device, requires_grad=True)
            output = ctx.operation(x, weight.float(), None)
        (gradient,) = torch.autograd.grad(output, x, gradients[0].float())
        return gradient.to(weight.dtype), None, None, None


def patch(name: str) -> None:
    """Have `torch.nn.functional.<name>` compute bf16 products of frozen weights in float32."""
    stock = getattr(F, name)

    def replacement(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
        if x.dtype != torch.bfloat16 or weight.requires_grad:
            return stock(x, weight, bias, *rest)
        return InFloat32.apply(x, weight, bias, lambda a, b, c: stock(a, b, c, *rest))

    setattr(F, name, replacement)


if __name__ == "__main__":
    for name in ("conv2d", "linear"):
        patch(name)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

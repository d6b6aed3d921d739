"""Outputs of a U-Net's blocks, for block distillation: Eq. 28."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class BlockRecorder:
    """Keeps the outputs of a U-Net's down, middle and up blocks."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.outputs: list[Tensor] = []
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        self.hooks = [
            block.register_forward_hook(self.keep) for block in blocks if block is not None
        ]

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

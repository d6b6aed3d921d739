"""Two stock parts as diffusers' pipelines call them: the pocket teacher's autoencoder and BERT."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from torch import Tensor


class AutoencoderDC(diffusers.AutoencoderDC):
    """diffusers' deep-compression autoencoder as `StableDiffusionPipeline` calls an autoencoder.

    Shortcuts carry pixels past every change of resolution, so it learns faster than
    `AutoencoderKL` (the pocket teacher's model card has the numbers).
    """

    @property
    def config(self) -> FrozenDict:
        """With the entry that the pipeline counts levels by; it is not saved."""
        config = super().config
        return FrozenDict({**config, "block_out_channels": config["decoder_block_out_channels"]})

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [-1, 1] to `latents` (B, C, h, w)."""
        latents = super().encode(x, return_dict=False)[0]
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(self, z: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """Latents (B, C, h, w) to a `sample` of images (B, 3, H, W); nothing in it is random."""
        return super().decode(z, return_dict=return_dict)


class BertModel(transformers.BertModel):
    """transformers' BERT; if its configuration says `sentence_state`, the first state is the mean.

    Sentence encoders such as all-MiniLM are trained on the mean of their token states. Their [CLS]
    state is left over from pre-training.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Tokens (B, n) to `last_hidden_state` (B, n, C); the mask is 0 for padding."""
        output = super().forward(input_ids, attention_mask, **kwargs)
        if getattr(self.config, "sentence_state", False):
            states = output.last_hidden_state
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            weight = mask[..., None].to(states)  # (B, n, 1)
            mean = (states * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            output.last_hidden_state = torch.cat([mean, states[:, 1:]], 1)
        return output

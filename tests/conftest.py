"""Small U-Nets of the kinds that the method must work on, with weights that hide nothing."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# no shrinking: most examples are seeds, and a smaller seed is no simpler
PHASES = (Phase.explicit, Phase.generate)
settings.register_profile("aptp", deadline=None, derandomize=True, max_examples=12, phases=PHASES)
settings.load_profile("aptp")

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "sd2": SMALL | {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "sd1": SMALL | {"attention_head_dim": 4, "layers_per_block": 1},
    "sdxl": SMALL
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
    # attention outside Transformers (with biases), time as scale and shift, no middle block
    "mixed": SMALL
    | {
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "mid_block_type": None,
        "only_cross_attention": (True, False),
        "resnet_time_scale_shift": "scale_shift",
        "resnet_out_scale_factor": 1.4,
    },
}


@pytest.fixture(scope="session", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """A tiny frozen U-Net of each layout. No bias is zero, as those of norms are at the start."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**LAYOUTS[request.param]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, Any]]:
    """make_inputs(unet, batch_size, seed): keyword arguments of a forward, with 5 text tokens."""

    def make(unet: UNet2DConditionModel, batch_size: int, seed: int = 0) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        inputs: dict[str, Any] = {
            "sample": torch.randn(batch_size, 4, 8, 8, generator=draw),
            "timestep": torch.randint(1000, (batch_size,), generator=draw),
            "encoder_hidden_states": torch.randn(batch_size, 5, 16, generator=draw),
        }
        if unet.config.addition_embed_type:
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch_size, 16, generator=draw),
                "time_ids": torch.randint(64, (batch_size, 6), generator=draw).float(),
            }
        return inputs

    return make

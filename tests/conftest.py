"""Small U-Nets of the kinds that the method must work on, with weights that hide nothing."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # which libraries read as they are imported
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # waiting threads soon leave the cores to others

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from hypothesis import Phase, settings
from short_start import shorten

from macs import measure_macs
from prune_unet import find_units
from run import Setup
from settings import Pruning
from teacher.conditions import Conditions
from teacher.encoded import Encoded
from teacher.model import Teacher

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
ROWS = 24  # of the tiny teacher's target
shorten()


def tiny_unet(layout: str) -> UNet2DConditionModel:
    """A tiny frozen U-Net. No bias is zero, as those of norms are at the start."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**LAYOUTS[layout]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session", params=LAYOUTS)
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """A tiny frozen U-Net of each layout."""
    return tiny_unet(request.param)


@pytest.fixture(scope="session")
def smallest() -> UNet2DConditionModel:
    """The smallest of them."""
    return tiny_unet("sd1")


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


def conditions_of(inputs: dict[str, Any]) -> Conditions:
    """The conditions among a U-Net's inputs."""
    added = inputs.get("added_cond_kwargs", {})
    parts = added.get("text_embeds"), added.get("time_ids")
    return Conditions(inputs["encoder_hidden_states"], *parts)


def tiny_teacher(unet: UNet2DConditionModel) -> Teacher:
    """A teacher of a tiny U-Net; an empty caption's text states, and pooled text, are all 7."""
    schedule = PNDMScheduler(prediction_type="v_prediction", skip_prk_steps=True)

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[torch.Tensor | None, ...]:
        assert not any(prompt)
        return torch.full((len(prompt), 5, 16), 7.0), None, torch.full((len(prompt), 16), 7.0), None

    config = SimpleNamespace(force_zeros_for_empty_prompt=False)
    pipe: Any = SimpleNamespace(
        unet=unet,
        scheduler=schedule,
        encode_prompt=encode_prompt,
        config=config,
        vae_scale_factor=8,
    )
    return Teacher("tiny", pipe, 1.0)


@pytest.fixture(scope="session")
def setup_of(
    make_inputs: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Setup]:
    """setup_of(unet, budget, depth, ...): noise as the target of a tiny teacher."""
    prices: dict[Any, Any] = {}
    out = tmp_path_factory.mktemp("run")

    def make(
        unet: UNet2DConditionModel, budget: float = 0.7, depth: str = "paper", **settings: Any
    ) -> Setup:
        key = (id(unet), depth)
        if key not in prices:
            space = find_units(unet, depth)
            prices[key] = unet, measure_macs(unet, space, latent_size=8, text_tokens=5)
        macs = prices[key][1]
        options = {"warmup_steps": 1, "joint_steps": 2, "batch_size": 6, "lr": 0.1, "lr_warmup": 2}
        cfg = Pruning(**{"budget": budget, "num_experts": 3, "out": out, **options, **settings})
        inputs = make_inputs(unet, ROWS, seed=3)
        absent: Any = None
        return Setup(
            cfg,
            tiny_teacher(unet),
            macs.space,
            macs,
            cost=macs,
            table=None,
            data=absent,
            validation=absent,
            encoder=absent,
            z=torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(0)),
            content=torch.eye(12),
            encoded=Encoded(inputs["sample"], conditions_of(inputs)),
            seconds=0.0,
        )

    return make

"""What each expert costs beside the dense U-Net: parameters, MACs, latency, peak memory.

    pytest bench/test_experts.py --benchmark-only                        # SD 2.1's shape
    pytest bench/test_experts.py --benchmark-only --bench-unet pocket    # in seconds

The table is at the end of the output and, with a picture, in `runs/bench/`.
"""

import functools

import pytest
import torch

from bench.costs import (
    fixed_costs,
    peak_bytes,
    prepare,
    prepared_copy,
    random_inputs,
    run,
    weight_bytes,
)
from bench.table import measured
from prune_unet import cut_expert


@pytest.fixture(scope="module")
def dense_of(unet, macs, latent_size, device):
    """dense_of(variant): the dense U-Net in that variant, its inputs and its costs."""
    costs = fixed_costs(unet, torch.ones(macs.space.size), macs, latent_size)

    @functools.lru_cache(maxsize=1)
    def ready(variant):
        torch.compiler.reset()  # forget the last variant's graphs
        model = prepared_copy(unet, variant)
        inputs = random_inputs(unet, variant, latent_size, device)
        peak = peak_bytes(lambda: run(model, inputs, variant.steps), device)
        return model, inputs, costs | {"peak_bytes": weight_bytes(model) + peak}

    return ready


def test_expert(
    take_turns,
    report_row,
    request,
    unet,
    experts,
    macs,
    latent_size,
    device,
    dense_of,
    variant,
    number,
):
    dense, inputs, dense_costs = dense_of(variant)
    code = experts.codes[number]
    expert = prepare(cut_expert(unet, code, experts.space), variant)
    peak = peak_bytes(lambda: run(expert, inputs, variant.steps), device)
    costs = fixed_costs(unet, code, macs, latent_size)
    costs["peak_bytes"] = weight_bytes(expert) + peak
    own, other = take_turns(
        lambda: run(expert, inputs, variant.steps),
        lambda: run(dense, inputs, variant.steps),
        rounds=min(request.config.getoption("--bench-rounds"), 3 if variant.steps else 99),
        warmup=1 if device.type == "cpu" else 3,
    )
    report_row(
        {
            "variant": variant.name,
            "caption": variant.caption,
            "expert": number,
            **measured(costs, own, other),
            "dense": measured(dense_costs, other, other),
        }
    )

"""Shared by the benchmarks: the U-Net that they run on, and fair ratios."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from unets import load_shape


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-unet",
        default="sd21",
        help="shape of the U-Net, with random weights: sd21, sd21-base, sd15, sdxl, pocket",
    )


@pytest.fixture(scope="session")
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """A U-Net of the asked-for shape with random weights, frozen; time depends on the shape."""
    torch.manual_seed(0)
    config = load_shape(request.config.getoption("--bench-unet")).config
    return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def latent_size(unet: UNet2DConditionModel) -> int:
    """256 pixels, or the U-Net's own size where that is less."""
    return min(32, int(unet.config.sample_size))


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., float]:
    """compare(subject, yardstick, rounds): median of the rounds' ratios subject / yardstick.

    Both run in turns, A B A B, so that the machine's drift cancels. `extra_info` holds the ratio
    and both medians in seconds.
    """

    def run(subject: Callable[[], Any], yardstick: Callable[[], Any], rounds: int = 7) -> float:
        times: dict[str, list[float]] = {"subject": [], "yardstick": []}

        def pair() -> None:
            for name, function in (("subject", subject), ("yardstick", yardstick)):
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(pair, rounds=rounds, warmup_rounds=1)
        del times["subject"][0], times["yardstick"][0]  # the warm-up
        ratio = statistics.median(
            a / b for a, b in zip(times["subject"], times["yardstick"], strict=True)
        )
        benchmark.extra_info["ratio"] = ratio
        for name, values in times.items():
            benchmark.extra_info[f"{name}_seconds"] = statistics.median(values)
        print(
            f"\n{benchmark.name}: ratio {ratio:.3f} "
            f"({statistics.median(times['subject']):.4g} s against "
            f"{statistics.median(times['yardstick']):.4g} s)"
        )
        return ratio

    return run

"""What the benchmarks share: a U-Net with random weights, and ratios taken inside one run."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel

from unets import load_shape

RATIOS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-unet", default="sd21", help="U-Net to time, as of prune_unet.py")
    parser.addoption("--bench-pixels", type=int, default=256, help="pixels a side")
    parser.addoption("--bench-rounds", type=int, default=7, help="rounds of what runs the U-Net")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def unet(request: pytest.FixtureRequest, device: torch.device) -> UNet2DConditionModel:
    """The U-Net of `--bench-unet`, frozen, with its modules' own random initialisation."""
    torch.manual_seed(0)
    model = load_shape(request.config.getoption("--bench-unet")).to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.eval().requires_grad_(False)


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """compare(ours, theirs, target, rounds): medians of runs in turn, theirs ours theirs ours ...

    Nothing is asserted: the ratio goes to the report's `extra_info` and to the end of the output.
    """

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run(
        ours: Callable[[], object], theirs: Callable[[], object], target: float, rounds: int
    ) -> None:
        own: list[float] = []
        other: list[float] = []
        benchmark.pedantic(
            lambda: own.append(timed(ours)),
            setup=lambda: other.append(timed(theirs)),
            rounds=rounds,
            warmup_rounds=1,
        )
        ratio = statistics.median(own[1:]) / statistics.median(other[1:])
        benchmark.extra_info.update(ratio=ratio, target=target)
        line = f"{request.node.name}: {ratio:.3f} of the other's time (target: {target} at most)"
        request.config.stash.setdefault(RATIOS, []).append(line)

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for line in config.stash.get(RATIOS, []):
        terminalreporter.write_line(line)

"""What the benchmarks share: a U-Net with random weights, timing in turns, and the final report."""

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench import table
from bench.costs import (
    Experts,
    pick_experts,
    random_unet,
    seconds,
    variants,
)
from common.errors import UserError, quiet_libraries
from macs import CostModel, measure_macs
from settings import RUNS
from teacher.shapes import CLIP_TOKENS, PIXELS, load_shape

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EXPERTS = pytest.StashKey[Experts]()
ROWS = pytest.StashKey[list[dict[str, Any]]]()  # of the table of experts
RATIOS = pytest.StashKey[list[dict[str, Any]]]()  # of everything else


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("aptp")
    group.addoption("--bench-unet", default="sd21", help="U-Net to time, as of bench.units")
    group.addoption("--run", type=Path, help="run whose experts to time; the newest that fits")
    group.addoption("--bench-pixels", type=int, help="pixels a side (CPU: 256, CUDA: 768)")
    group.addoption("--bench-batch", type=int, help="samples of a training step (CPU: 2, CUDA: 64)")
    group.addoption("--bench-rounds", type=int, default=7, help="rounds of what runs the U-Net")
    group.addoption("--bench-out", type=Path, default=RUNS / "bench", help="folder of CSV and PNG")


def pytest_configure(config: pytest.Config) -> None:
    """Pick the experts before anything runs; quiet pytest-benchmark's own table.

    It would compare what has nothing in common, and the report below says more. It is shown if its
    columns are asked for, as by `--benchmark-columns=median,iqr,rounds`.
    """
    quiet_libraries()
    if not any("--benchmark-columns" in given for given in config.invocation_params.args):
        config.option.benchmark_quiet = True
    folder, root = config.getoption("--run"), config.rootpath / RUNS
    try:
        shape = load_shape(config.getoption("--bench-unet"))
        config.stash[EXPERTS] = pick_experts(shape, latent_size_of(config), folder, root)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[ROWS], config.stash[RATIOS] = [], []


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def latent_size_of(config: pytest.Config) -> int:
    """Latent positions a side at which experts are timed here."""
    own = next(v.pixels for v in variants() if v.device == this_device().type)
    return (config.getoption("--bench-pixels") or own) // PIXELS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every expert in every variant of this device; a variant of another device is skipped."""
    if "variant" not in metafunc.fixturenames:
        return
    device, params = this_device().type, []
    for variant in variants():
        if variant.device == device:
            numbers = range(len(metafunc.config.stash[EXPERTS].codes))
            params += [pytest.param(variant, i, id=f"{variant.name}-{i}") for i in numbers]
        else:
            skip = pytest.mark.skip(reason=f"needs {variant.device}, this machine runs on {device}")
            params.append(pytest.param(variant, None, id=variant.name, marks=skip))
    metafunc.parametrize(("variant", "number"), params)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return this_device()


@pytest.fixture(scope="session")
def unet(request: pytest.FixtureRequest, device: torch.device) -> UNet2DConditionModel:
    """The U-Net of `--bench-unet` with random weights, for the whole session."""
    return random_unet(load_shape(request.config.getoption("--bench-unet")), device)


@pytest.fixture(scope="session")
def latent_size(request: pytest.FixtureRequest) -> int:
    return latent_size_of(request.config)


@pytest.fixture(scope="session")
def experts(request: pytest.FixtureRequest) -> Experts:
    return request.config.stash[EXPERTS]


@pytest.fixture(scope="session")
def macs(unet: UNet2DConditionModel, experts: Experts, latent_size: int) -> CostModel:
    return measure_macs(unet, experts.space, latent_size=latent_size, text_tokens=CLIP_TOKENS)


@pytest.fixture
def take_turns(benchmark, device: torch.device) -> Callable[..., tuple[list[float], list[float]]]:
    """take_turns(ours, theirs, rounds, warmup): seconds of runs theirs ours theirs ours ..."""

    def run(
        ours: Callable[[], object], theirs: Callable[[], object], rounds: int, warmup: int = 1
    ) -> tuple[list[float], list[float]]:
        own: list[float] = []
        other: list[float] = []
        benchmark.pedantic(
            lambda: own.append(seconds(ours, device)),
            setup=lambda: other.append(seconds(theirs, device)),
            rounds=rounds,
            warmup_rounds=warmup,
        )
        kept = min(rounds, len(own))  # with --benchmark-disable there is one round in all
        return own[-kept:], other[-kept:]

    return run


@pytest.fixture
def compare(benchmark, take_turns, request: pytest.FixtureRequest) -> Callable[..., None]:
    """compare(what, ours, theirs, target, rounds): the ratio of their times, taken in turns.

    Nothing is asserted: the ratio goes to the report's `extra_info` and to the end of the output.
    `target` is None where the ratio is for information; `theirs` counts `scale` times.
    """

    def run(
        what: str,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        *,
        target: float | None,
        rounds: int,
        warmup: int = 1,
        scale: float = 1,
    ) -> None:
        own, other = take_turns(ours, theirs, rounds, warmup)
        other = [scale * value for value in other]
        found = {
            "what": what,
            "ratio": table.paired_ratio(own, other),
            "target": target,
            "own": statistics.median(own),
            "other": statistics.median(other),
        }
        benchmark.extra_info.update(found)
        request.config.stash[RATIOS].append(found)

    return run


@pytest.fixture
def report_ratio(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """report_ratio(what, ratio, target): a figure and its aim, for the end of the output."""

    def keep(what: str, ratio: float, target: float) -> None:
        found = {"what": what, "ratio": ratio, "target": target}
        benchmark.extra_info[what] = found
        request.config.stash[RATIOS].append(found)

    return keep


@pytest.fixture
def report_row(
    benchmark, request: pytest.FixtureRequest, latent_size: int
) -> Callable[[dict[str, Any]], None]:
    """report_row(row): an expert's row, for `extra_info` and for the table at the end."""

    config = request.config

    def keep(row: dict[str, Any]) -> None:
        where = {"unet": config.getoption("--bench-unet"), "pixels": PIXELS * latent_size}
        benchmark.extra_info.update(row, **where, codes=config.stash[EXPERTS].source)
        config.stash[ROWS].append(row)

    return keep


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows, found = config.stash.get(ROWS, []), config.stash.get(RATIOS, [])
    if rows:
        out, pixels = config.getoption("--bench-out"), PIXELS * latent_size_of(config)
        title = f"U-Net {config.getoption('--bench-unet')}, {pixels} px, {machine()}"
        table.write_csv(out / "experts.csv", rows)
        table.write_png(out / "experts.png", rows, title)
        terminalreporter.section("what each expert costs")
        for line in table.text(rows, title, config.stash[EXPERTS].source):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"Written to {out}/experts.csv and experts.png.")
    if found:
        terminalreporter.section("what was found, and what was aimed at")
    for ratio in found:
        terminalreporter.write_line(table.verdict(ratio))


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, threads: {torch.get_num_threads()}"

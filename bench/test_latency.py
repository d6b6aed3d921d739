"""Does an expert take the time that was asked for? T(a) in seconds against experts' own times.

    pytest bench/test_latency.py --benchmark-only                        # SD 2.1's shape
    pytest bench/test_latency.py --benchmark-only --bench-unet pocket    # in two minutes

A table of the U-Net is measured, random logits become codes that meet a budget of the dense
latency, and the experts are timed in turns with the dense U-Net; then the sum is corrected and the
budget met again, as `train.py --cost latency` does at its end. On a CPU a second is one of one
thread, at a batch of one; on a GPU experts run in fp16 at a batch of two, eager and as CUDA graphs.
"""

import pytest
import torch

from bench.costs import SEED
from common.randomness import step_generator
from latency import Place, latency_model, measure_table, meet_in_time
from prune_unet import find_units
from teacher.shapes import CLIP_TOKENS, PIXELS

EXPERTS = 3
BUDGETS = (0.5, 0.64, 0.78)
RUNTIMES = {"cpu": ("eager",), "cuda": ("eager", "graph")}
OF_EXPERT, OF_MEAN, OF_BUDGET = 0.05, 0.03, 0.03  # aims


@pytest.fixture(scope="module", params=["eager", "graph"])
def timed(request, unet, device, latent_size):
    """Where, the table measured there, and T(a)."""
    if request.param not in RUNTIMES[device.type]:
        pytest.skip(f"not on {device.type}")
    how = ("fp32", 1) if device.type == "cpu" else ("fp16", 2)
    place = Place(str(device), *how, PIXELS * latent_size, latent_size, CLIP_TOKENS, request.param)
    table = measure_table(unet, place)
    return place, table, latency_model(unet, find_units(unet, "all"), table)


@pytest.mark.parametrize("budget", BUDGETS)
def test_experts_at_a_latency_budget(benchmark, report_ratio, unet, timed, budget):
    place, table, cost = timed
    logits = torch.randn(
        EXPERTS, cost.space.size, generator=step_generator(SEED, "latency", int(100 * budget))
    )
    shares = torch.full((EXPERTS,), 1 / EXPERTS)
    given = {"device": place.device, "budget": budget, "logits": logits, "shares": shares}
    _, summary, experts = benchmark.pedantic(
        lambda: meet_in_time(unet, cost, table, **given), rounds=1
    )
    where = f"{place.device}, {place.precision}, batch {place.batch}, {place.runtime}"
    errors = [e["latency_predicted"] / e["latency_measured"] - 1 for e in experts]
    report_ratio(
        f"predicted against measured latency, worst of {EXPERTS} experts at {budget}, {where}",
        max(map(abs, errors)),
        OF_EXPERT,
    )
    report_ratio(
        f"predicted against measured latency, mean of {EXPERTS} experts at {budget}, {where}",
        abs(sum(errors) / len(errors)),
        OF_MEAN,
    )
    report_ratio(
        f"experts at a latency budget: |measured mean ratio - {budget}|, {where}",
        abs(summary["latency_ratio_mean"] - budget),
        OF_BUDGET,
    )

"""What it costs to serve prompts: routing, sampling expert by expert, loading an expert.

    pytest bench/test_serving.py --benchmark-only

On a CPU, images are generated with the pocket teacher, and a few with SD 2.1's shape; on a GPU,
with SD 2.1's shape. The experts have one architecture, so a mixed batch differs from one expert's
only in the grouping. Each group pays a forward's fixed cost (calling operators, reading weights):
on the pocket U-Net as much as generating several images takes, on SD 2.1's less than generating
one.
"""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from bench.costs import SEED
from common.files import save_tensors, write_json
from common.randomness import step_generator
from macs import measure_macs, meet_budget
from prune_unet import cut_expert, load_expert, save_expert
from router import PromptEncoder, PromptRouter
from sample import APTPPipeline
from targets.images import load_target
from teacher.shapes import CLIP_TOKENS, PIXELS, load_shape

EXPERTS = 8  # of the router that is timed
BUDGET = 0.78
ONE_BY_ONE = 8  # of the prompts, sampled one at a time


class Served(NamedTuple):
    """A run whose experts are asked for by a mixed batch."""

    teacher: str
    shape: str
    pixels: int
    precision: str
    experts: int
    prompts: int
    steps: int
    rounds: int
    target: float  # of a mixed batch beside one expert's


POCKET = Served("pocket", "pocket", 64, "fp32", 8, 64, 25, 3, 1.25)
SD21 = Served("sd21-random", "sd21", 256, "fp32", 4, 16, 2, 1, 1.10)
SD21_GPU = Served("sd21-random", "sd21", 256, "fp16", 8, 64, 25, 3, 1.25)
SERVED = {"cpu": (POCKET, SD21), "cuda": (SD21_GPU,)}


@pytest.fixture(scope="module")
def captions():
    return load_target("emoji", "train", limit=1000).captions


def test_routing_a_thousand_prompts(compare, experts, captions, device):
    encoder = PromptEncoder(device=device)
    width = encoder(captions[:1]).shape[1]
    torch.manual_seed(SEED)
    router = PromptRouter(width, experts.space.size, EXPERTS)
    torch.nn.init.normal_(router.codes)
    router.to(device)
    compare(
        f"routing {len(captions)} prompts / encoding them alone",
        lambda: router.route(captions, encoder),
        lambda: encoder(captions),
        target=None,
        rounds=5,
    )


@pytest.fixture(scope="module", params=[0, 1], ids=["first", "second"])
def served(request, device):
    if request.param >= len(SERVED[device.type]):
        pytest.skip(f"one shape is enough on {device.type}")
    return SERVED[device.type][request.param]


@pytest.fixture(scope="module")
def pipeline(served, captions, device, tmp_path_factory):
    """A run with experts of one architecture, that share the prompts."""
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    N, pixels = served.experts, served.pixels
    sizes = {"latent_size": pixels // PIXELS, "text_tokens": CLIP_TOKENS}
    macs = measure_macs(load_shape(served.shape), **sizes)
    logits = torch.randn(1, macs.space.size, generator=step_generator(SEED, "mixed"))
    code = meet_budget(logits, torch.ones(1), macs, BUDGET)
    encoder = PromptEncoder(device="cpu")
    z = encoder(captions)
    torch.manual_seed(SEED)
    router = PromptRouter(z.shape[1], macs.space.size, N)
    router.mean_z.copy_(z.mean(0))
    router.start_codes(z)
    save_tensors(
        folder / "router.safetensors",
        router.state_dict(),
        {**router.settings(), "prompt_encoder": "minilm"},
    )
    save_tensors(
        folder / "codes.safetensors",
        {"codes": code.to(torch.uint8).repeat(N, 1)},
        {"depth": macs.space.depth},
    )
    ratio = (macs(code[0]) / macs.dense).item()
    listed = [{"id": i, "macs_ratio": ratio} for i in range(N)]
    summary = {
        "target": "emoji",
        "teacher": served.teacher,
        "resolution": pixels,
        "budget": BUDGET,
        "num_experts": N,
        "experts": listed,
        "macs_dense": round(macs.dense),
        "macs_ratio_mean": ratio,
        "usage_train": [1 / N] * N,
        "usage_validation": [1 / N] * N,
    }
    write_json(folder / "summary.json", summary)
    options = {"precision": served.precision, "resolution": pixels}
    made = APTPPipeline.from_pretrained(folder, str(device), **options)
    if served == SD21:  # four would need 11 GB; one does not fit into a cache either
        made.experts |= dict.fromkeys(range(N), made.unet(0))
    for i in range(N):
        made(captions[:1], expert=i, num_inference_steps=1)  # cuts it
    return made


@pytest.fixture(scope="module")
def mixed(served, pipeline, captions):
    """Prompts that ask for every expert."""
    prompts = captions[:: len(captions) // served.prompts][: served.prompts]
    assert set(pipeline.route(prompts)) == set(range(served.experts))
    return prompts


def test_mixed_batch_beside_one_experts(compare, served, pipeline, mixed):
    compare(
        f"{served.prompts} prompts in {served.experts} experts' groups / through one expert, "
        f"{served.steps} steps, {served.teacher}",
        lambda: pipeline(mixed, num_inference_steps=served.steps),
        lambda: pipeline(mixed, expert=0, num_inference_steps=served.steps),
        target=served.target,
        rounds=served.rounds,
        warmup=0,
    )


def test_mixed_batch_beside_one_at_a_time(compare, served, pipeline, mixed):
    if served == SD21:
        pytest.skip("takes minutes")
    few = mixed[:: served.prompts // ONE_BY_ONE]

    def one_by_one():
        for prompt in few:
            pipeline([prompt], num_inference_steps=served.steps)

    times = served.prompts // ONE_BY_ONE
    compare(
        f"{served.prompts} prompts in groups / {times} times {ONE_BY_ONE} one by one, "
        f"{served.teacher}",
        lambda: pipeline(mixed, num_inference_steps=served.steps),
        one_by_one,
        scale=times,
        target=None,
        rounds=2,
        warmup=0,
    )


def test_loading_an_expert(compare, unet, experts, macs, device, tmp_path):
    """Against reading the same file's tensors. The smallest expert, to save time."""
    code = experts.codes[macs(experts.codes).argmin()]
    path = tmp_path / "expert.safetensors"
    save_expert(
        path, cut_expert(unet, code, experts.space).state_dict(), unet.config, code, experts.space
    )

    def read():  # and not only map into memory
        return [tensor.to(device, copy=True) for tensor in load_file(path).values()]

    try:
        compare(
            f"loading an expert ({path.stat().st_size / 2**20:,.0f} MiB) / reading its tensors",
            lambda: load_expert(path, device),
            read,
            target=1.5,
            rounds=3,
        )
    finally:
        path.unlink()

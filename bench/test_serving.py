"""What it costs to serve prompts: routing them, drawing them expert by expert, loading an expert.

    pytest bench/test_serving.py --benchmark-only

Whole drawings are made with the pocket teacher. Its eight experts have one architecture, so that a
mixed batch differs from one expert's in the grouping alone. The pocket U-Net is so small that a
forward's fixed costs weigh as much as several images; what grouping costs a large U-Net is shown by
forwards at the shape of `--bench-unet`.
"""

from dataclasses import replace

import pytest
import safetensors.torch
import torch

from bench.costs import SEED, Variant, random_inputs, run
from data import load_target
from gates import ArchSpace
from macs import measure_macs, meet_budget
from prune_unet import cut_expert, load_expert, save_expert
from router import PromptEncoder, PromptRouter
from runfolder import save_tensors, step_generator, write_json
from sample import APTPPipeline
from teacher import load_teacher

EXPERTS = 8
BUDGET = 0.78
PROMPTS = 64
ONE_BY_ONE = 8  # of these prompts, drawn one at a time
STEPS = 25


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


@pytest.fixture(scope="module")
def pipeline(captions, device, tmp_path_factory):
    """A run of the pocket teacher: eight experts of one architecture, that share the prompts."""
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    teacher = load_teacher("pocket", "cpu")
    space = ArchSpace.from_unet(teacher.unet)
    sizes = {"latent_size": teacher.latent_size, "text_tokens": teacher.text_tokens}
    macs = measure_macs(teacher.unet, space, **sizes)
    logits = torch.randn(1, space.size, generator=step_generator(SEED, "mixed"))
    code = meet_budget(logits, torch.ones(1), macs, BUDGET)
    encoder = PromptEncoder(device="cpu")
    z = encoder(captions)
    torch.manual_seed(SEED)
    router = PromptRouter(z.shape[1], space.size, EXPERTS)
    router.mean_z.copy_(z.mean(0))
    router.start_codes(z)
    save_tensors(
        folder / "router.safetensors",
        router.state_dict(),
        {**router.settings(), "prompt_encoder": "minilm"},
    )
    save_tensors(
        folder / "codes.safetensors",
        {"codes": code.to(torch.uint8).repeat(EXPERTS, 1)},
        {"depth": space.depth},
    )
    ratio = (macs(code[0]) / macs.dense).item()
    listed = [{"id": i, "macs_ratio": ratio} for i in range(EXPERTS)]
    write_json(folder / "summary.json", {"teacher": "pocket", "experts": listed})
    made = APTPPipeline.from_pretrained(folder, str(device))
    for i in range(EXPERTS):
        made(captions[:1], expert=i, num_inference_steps=1)  # cuts it
    return made


@pytest.fixture(scope="module")
def mixed(pipeline, captions):
    """64 prompts that ask for every expert."""
    prompts = captions[:: len(captions) // PROMPTS][:PROMPTS]
    assert set(pipeline.route(prompts)) == set(range(EXPERTS))
    return prompts


def test_mixed_batch_beside_one_experts(compare, pipeline, mixed):
    compare(
        f"{PROMPTS} prompts grouped by {EXPERTS} experts / through one of equal MACs",
        lambda: pipeline(mixed, num_inference_steps=STEPS),
        lambda: pipeline(mixed, expert=0, num_inference_steps=STEPS),
        target=1.25,
        rounds=3,
        warmup=0,
    )


def test_mixed_batch_beside_one_at_a_time(compare, pipeline, mixed):
    few = mixed[:: PROMPTS // ONE_BY_ONE]

    def one_by_one():
        for prompt in few:
            pipeline([prompt], num_inference_steps=STEPS)

    compare(
        f"{PROMPTS} prompts grouped / one at a time ({PROMPTS // ONE_BY_ONE} x {ONE_BY_ONE} drawn)",
        lambda: pipeline(mixed, num_inference_steps=STEPS),
        one_by_one,
        scale=PROMPTS / ONE_BY_ONE,
        target=None,
        rounds=2,
        warmup=0,
    )


def test_forwards_of_small_groups(compare, unet, experts, macs, latent_size, device):
    """A prompt a group (two images: with guidance, without), against four prompts at once."""
    variant = Variant("group", device.type, torch.float32, batch=2)
    code = experts.codes[macs(experts.codes).argmin()]
    expert = cut_expert(unet, code, experts.space)
    two = random_inputs(unet, variant, latent_size, device)
    eight = random_inputs(unet, replace(variant, batch=8), latent_size, device)

    def in_groups():
        for _ in range(4):
            run(expert, two)

    compare(
        "4 forwards of 2 images / 1 forward of 8, smallest expert",
        in_groups,
        lambda: run(expert, eight),
        target=1.25,
        rounds=3,
    )


def test_loading_an_expert(compare, unet, experts, macs, device, tmp_path):
    """Against reading the same file's bytes as safetensors. The smallest expert, to save time."""
    code = experts.codes[macs(experts.codes).argmin()]
    path = tmp_path / "expert.safetensors"
    save_expert(path, cut_expert(unet, code, experts.space), code, experts.space)
    try:
        compare(
            f"loading an expert ({path.stat().st_size / 2**20:,.0f} MiB) / reading its tensors",
            lambda: load_expert(path, device),
            lambda: safetensors.torch.load(path.read_bytes()),
            target=None,
            rounds=3,
        )
    finally:
        path.unlink()

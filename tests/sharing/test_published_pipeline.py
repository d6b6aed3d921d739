"""What a diffusers user passes to the published pipeline, beside the stock pipeline's answer."""

import copy

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from small_runs import PROMPTS, routed_pipeline, tiny_run

from prune_unet import attach_gates
from run import load_codes
from sample import APTPPipeline

STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipe(request, place):
    run = tiny_run(place, request.param, "all")
    return routed_pipeline(run, place / f"router-{request.param}")


def noise(seed, height=8, width=8):
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))


def stock(pipe, expert, **options):
    """One image's latents by the pipeline that the published one extends."""
    other = copy.copy(pipe)
    other.unet, other.scheduler = pipe.expert(expert), copy.deepcopy(pipe.scheduler)
    call = type(pipe).__mro__[2].__call__
    return call(other, **STEPS | options, output_type="latent", return_dict=False)[0]


def test_prompts_negatives_sizes_and_several_images(pipe):
    """Not square, two images a prompt, a negative prompt each, a generator each."""
    prompts, negatives = list(PROMPTS[:4]), ["blue", "", "a dog", "night"]
    seeds = range(2 * len(prompts))
    options = {"height": 16, "width": 24, "guidance_scale": 3.0, "num_images_per_prompt": 2}
    result = pipe(
        prompts,
        negative_prompt=negatives,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **STEPS,
        **options,
    )
    assert result.experts == [i for i in pipe.route(prompts) for _ in range(2)]
    assert len(set(result.experts)) > 1
    for k, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        pair = slice(2 * k, 2 * k + 2)
        own = stock(
            pipe,
            result.experts[2 * k],
            prompt=prompt,
            negative_prompt=negative,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[pair]],
            **options,
        )
        assert own.shape == (2, 4, 8, 12)
        assert torch.allclose(result.images[pair], own, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_generator_makes_the_noise_of_all(pipe, guidance):
    """As in the stock pipeline: in the callers' order, whatever the experts."""
    prompts, draw = list(PROMPTS[:3]), torch.Generator().manual_seed(0)
    options = {"guidance_scale": guidance, "output_type": "latent"}
    images, experts = pipe(prompts, generator=draw, return_dict=False, **STEPS, **options)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, prompt in enumerate(prompts):
        one = {"prompt": prompt, "latents": latents[k : k + 1], "guidance_scale": guidance}
        assert torch.allclose(images[k], stock(pipe, experts[k], **one)[0], atol=1e-3, rtol=1e-3)


def test_a_callback_sees_every_step_of_all_images(pipe):
    seen = []

    def keep(pipeline, step, timestep, tensors):
        seen.append((step, len(tensors["latents"])))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    result = pipe(list(PROMPTS), callback_on_step_end=keep, output_type="latent", **STEPS)
    # PNDM makes one step more than it is asked for
    assert seen == [(k, len(PROMPTS)) for k in range(4)] and not result.images.any()


def test_output_types_and_precision(pipe):
    kinds = {kind: pipe("a dog", output_type=kind, **STEPS).images for kind in ("pil", "np", "pt")}
    assert kinds["pil"][0].size == (16, 16)
    assert kinds["np"].shape == (1, 16, 16, 3) and kinds["pt"].shape == (1, 3, 16, 16)
    routed = pipe.route(PROMPTS)
    pipe.to(torch.bfloat16)
    half = pipe(list(PROMPTS), output_type="latent", **STEPS)
    assert half.images.dtype == torch.bfloat16 and half.experts == routed
    pipe.to(torch.float32)


def test_experts_can_be_given(pipe):
    assert pipe(["a dog", "a cat"], experts=2, **STEPS).experts == [2, 2]
    assert pipe(["a dog", "a cat"], experts=[2, 0], **STEPS).experts == [2, 0]
    embeds = pipe.encode_prompt("a dog", "cpu", 1, False) if "XL" not in type(pipe).__name__ else ()
    if embeds:
        given = {"prompt_embeds": embeds[0], "guidance_scale": 1.0}
        assert pipe(experts=1, **given, **STEPS).experts == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no text to route"),
        ({"prompt": "a dog", "experts": 3}, "0 to 2"),
        ({"prompt": ["a dog"], "experts": [0, 1]}, "1 numbers"),
    ],
)
def test_what_cannot_be_is_refused(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(**options)


def test_an_ip_adapter_is_refused_in_one_line(pipe):
    with pytest.raises(ValueError, match="IP-Adapter"):
        pipe.load_ip_adapter("any")
    parts = {k: v for k, v in pipe.components.items() if k not in ("unet", "router")}
    one = type(pipe).__mro__[2](**parts, unet=pipe.expert(0))
    adapter = {"image_proj": {"x": torch.ones(1)}, "ip_adapter": {"x": torch.ones(1)}}
    with pytest.raises(ValueError, match="IP-Adapter"):
        one.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)


def test_offloading_to_the_cpu_gives_the_same_images(place):
    run = tiny_run(place, "sd1", "all")
    pipe = routed_pipeline(run, place / "router-offloaded")
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    before = pipe(list(PROMPTS), **options, **STEPS).images
    pipe.enable_model_cpu_offload(device="cpu")
    options["generator"].manual_seed(0)
    assert torch.equal(pipe(list(PROMPTS), **options, **STEPS).images, before)


def test_a_controlnet_of_the_teacher_works_on_an_expert(place):
    """As on the gated U-Net: expert 0 was cut out of the teacher, and not fine-tuned."""
    run = tiny_run(place, "sd1", "all")
    pipe = routed_pipeline(run, place / "router-controlled")
    own = APTPPipeline.from_pretrained(run, "cpu")
    dense, space = own.teacher.unet, own.space
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(dense, conditioning_embedding_out_channels=(16, 32))
    for weight in control.requires_grad_(False).eval().parameters():
        weight.add_(0.05 * torch.randn(weight.shape))  # its last layers start at zero
    controlled = StableDiffusionControlNetPipeline.from_pipe(
        pipe, unet=pipe.expert(0), controlnet=control
    )
    options = {
        "prompt": "a dog",
        "image": torch.rand(1, 3, 16, 16),
        "latents": noise(3),
        "output_type": "latent",
        **STEPS,
    }
    found = controlled(**options).images
    assert not torch.allclose(
        controlled(**options, controlnet_conditioning_scale=0.0).images, found, atol=1e-2
    )
    attach_gates(dense, space).set_gates(load_codes(run, space)[:1])
    controlled.unet = dense
    assert torch.allclose(controlled(**options).images, found, atol=1e-5, rtol=1e-4)

"""LoRAs of the teacher on experts: slicing one is merging it into the teacher, then cutting."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from small_runs import PROMPTS, routed_pipeline, tiny_run
from test_pruned_unet import pruned, random_code

from gates import removed_layers
from prune_unet import cut_expert, find_units

KINDS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feedforward": ("ff.net.0.proj", "ff.net.2"),
    "resnet": ("conv1", "conv2", "time_emb_proj", "conv_shortcut"),
    "others": ("proj_in", "proj_out", "downsamplers.0.conv", "conv_in"),
}
RANK, STEPS = 2, {"num_inference_steps": 2, "output_type": "latent"}


def make_adapter(unet, ends, seed=0):
    """A LoRA of all of a U-Net's layers whose names end so, as diffusers saves it."""
    draw = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, module in unet.named_modules():
        if name.endswith(ends):
            out, into, *kernel = module.weight.shape
            shapes = {"A": (RANK, into, *kernel), "B": (out, RANK, *[1] * len(kernel))}
            for side, shape in shapes.items():
                noise = 0.1 * torch.randn(shape, generator=draw)
                adapter[f"unet.{name}.lora_{side}.weight"] = noise
    assert adapter
    return adapter


def merged(unet, adapter, scale=1.0):
    """A copy of a dense U-Net with W + scale B A."""
    unet = copy.deepcopy(unet)
    for key, A in adapter.items():
        if ".lora_A." in key:
            name = key.removeprefix("unet.").partition(".lora_")[0]
            B = adapter[key.replace("lora_A", "lora_B")]
            delta = B.flatten(1) @ A.flatten(1)
            weight = unet.get_submodule(name).weight
            weight.data += scale * delta.view(weight.shape)
    return unet


@pytest.mark.parametrize(("kind", "alpha"), [*((kind, None) for kind in KINDS), ("all", 5.0)])
def test_slicing_is_merging_then_cutting(unet, make_inputs, kind, alpha):
    ends = KINDS[kind] if kind in KINDS else sum(KINDS.values(), ())
    adapter = make_adapter(unet, ends)
    space = find_units(unet, "all")
    code, inputs = random_code(space, 2), make_inputs(unet, 2)
    assert removed_layers(code, space)
    expert = pruned(unet, code, space)
    here = {f"unet.{name}" for name, _ in expert.named_modules()}
    assert {key.partition(".lora_")[0] for key in expert.slice_lora(adapter, "unet")} <= here
    names = {key.partition(".lora_")[0] for key in adapter}
    alphas = {f"{name}.alpha": alpha for name in names} if alpha else None
    expert.load_lora_adapter(adapter, prefix="unet", network_alphas=alphas)
    whole = cut_expert(merged(unet, adapter, (alpha or RANK) / RANK), code, space)
    with torch.no_grad():
        assert torch.allclose(expert(**inputs).sample, whole(**inputs).sample, atol=2e-5, rtol=1e-4)
    expert.fuse_lora()
    expert.unload_lora()
    states = expert.state_dict(), whole.state_dict()
    assert all(torch.allclose(states[0][name], states[1][name], atol=2e-6) for name in states[1])


def test_it_is_added_to_weights_that_were_refitted(smallest, make_inputs):
    space = find_units(smallest, "all")
    code, adapter = random_code(space, 2), make_adapter(smallest, KINDS["resnet"])
    expert = pruned(smallest, code, space)
    for weight in expert.parameters():
        weight.mul_(1.5)
    cut = cut_expert(smallest, code, space).state_dict()
    both = cut_expert(merged(smallest, adapter), code, space).state_dict()
    expected = {name: 1.5 * cut[name] + both[name] - cut[name] for name in cut}
    expert.load_lora_adapter(adapter, prefix="unet")
    expert.fuse_lora()
    expert.unload_lora()
    found = expert.state_dict()
    assert all(torch.allclose(found[name], expected[name], atol=4e-6) for name in found)


# ---- by a pipeline ----


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pipe(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    run = tiny_run(place, request.param, "all")
    pipe = routed_pipeline(run, place / "router")
    pipe.dense = UNet2DConditionModel.from_pretrained(place / f"teacher-{request.param}" / "unet")
    return pipe


def images(pipe):
    return pipe(list(PROMPTS), generator=torch.Generator().manual_seed(0), **STEPS).images


def layers(pipe):
    return [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]


def test_adapters_are_loaded_weighed_fused_and_unloaded(pipe, tmp_path):
    attention = make_adapter(pipe.dense, KINDS["attention"])
    resnet = make_adapter(pipe.dense, KINDS["resnet"], seed=1)
    save_file(attention, tmp_path / "attention.safetensors")
    before = images(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="attention.safetensors", adapter_name="a")
    pipe.load_lora_weights(resnet, adapter_name="b")
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}
    pipe.set_adapters("a")
    only = images(pipe)
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.allclose(images(pipe), only, atol=1e-4) and not torch.allclose(before, only)
    pipe.disable_lora()
    assert torch.equal(images(pipe), before)
    pipe.enable_lora()
    pipe.delete_adapters("b")
    pipe.fuse_lora(lora_scale=1.0)
    assert pipe.fused_loras == {"a"}
    assert torch.allclose(images(pipe), only, atol=1e-3, rtol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert not layers(pipe) and torch.allclose(images(pipe), before, atol=1e-3, rtol=1e-3)
    assert pipe.get_list_adapters() == {}


def test_adapters_in_the_format_of_kohya(pipe):
    """With an alpha in each layer: the same images as in diffusers' format."""
    adapter = make_adapter(pipe.dense, ("attn1.to_q", "attn2.to_out.0", "ff.net.2"))
    kohya = {}
    for key, value in adapter.items():
        name, _, side = key.removeprefix("unet.").partition(".lora_")
        own = "lora_unet_" + name.replace(".", "_")
        kohya[f"{own}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value
        kohya[f"{own}.alpha"] = torch.tensor(2.0 * RANK)
    pipe.load_lora_weights(kohya)
    found = images(pipe)
    pipe.unload_lora_weights()
    doubled = {key: value * (2 if "lora_B" in key else 1) for key, value in adapter.items()}
    pipe.load_lora_weights(doubled)
    expected = images(pipe)
    pipe.unload_lora_weights()
    assert torch.allclose(found, expected, atol=1e-4)


def test_an_adapter_that_diffusers_saved_with_its_settings(pipe, tmp_path):
    """The file names the layers that it changes, those that an expert has no more among them."""
    from peft import LoraConfig, get_peft_model_state_dict

    dense = copy.deepcopy(pipe.dense)
    dense.add_adapter(LoraConfig(r=RANK, lora_alpha=6, target_modules=["to_q", "conv1", "net.2"]))
    for name, weight in dense.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    layers_of = get_peft_model_state_dict(dense)
    options = {"unet_lora_adapter_metadata": dense.peft_config["default"].to_dict()}
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers_of, **options)
    before = images(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipe.fuse_lora()
    for expert in pipe.unet.experts.values():
        for name, module in expert.named_modules():
            if isinstance(module, BaseTunerLayer):
                assert module.scaling["default_0"] == 3.0, name
    assert not torch.allclose(images(pipe), before, atol=1e-2)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


def test_an_expert_alone_takes_them_in_a_stock_pipeline(pipe):
    parts = {k: v for k, v in pipe.components.items() if k not in ("unet", "router")}
    stock = type(pipe).__mro__[2](**parts, unet=pipe.expert(0))
    adapter = make_adapter(pipe.dense, sum(KINDS.values(), ()))
    stock.load_lora_weights(adapter, adapter_name="x")
    stock.set_adapters("x", 0.5)
    found = stock.unet.state_dict()
    name = "up_blocks.1.resnets.0.conv1"
    kept = pipe.expert(0).cuts.get(name, (None, None))[0]
    rows = adapter[f"unet.{name}.lora_B.weight"]
    assert torch.equal(found[f"{name}.lora_B.x.weight"], rows if kept is None else rows[kept])
    stock.unload_lora_weights()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda key, value: (key.replace("attn1", "attn7"), value), "attn7.* is not here"),
        (lambda key, value: (key, value.repeat(3, 3)), "another model: it has"),
        (lambda key, value: (key.replace("lora_A.weight", "lora_Q"), value), "no LoRA"),
    ],
)
def test_adapters_of_another_model_are_refused_in_one_line(pipe, change, words):
    adapter = make_adapter(pipe.dense, ("attn1.to_q",))
    with pytest.raises(ValueError, match=words) as error:
        pipe.load_lora_weights(dict(change(key, value) for key, value in adapter.items()))
    assert "\n" not in str(error.value) and not layers(pipe)

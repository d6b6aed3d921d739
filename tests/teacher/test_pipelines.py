"""Folders as the hub has them: what loads is what stock diffusers loads, the rest is one line."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import LAYOUTS
from diffusers import (
    AutoencoderDC,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from small_pipelines import (
    LAYOUT_NAMES,
    add_half_precision,
    put_in_hub_cache,
    write_pipeline,
)
from transformers import CLIPTextModel, CLIPTokenizer

from common.errors import UserError
from common.files import read_json, write_json
from common.hub import STABLE_DIFFUSION
from common.randomness import step_generator
from teacher import parts, pipelines
from teacher.conditions import Conditions
from teacher.model import add_noise, load_teacher
from teacher.pipelines import random_pipeline
from teacher.shapes import ASSETS, TEACHERS, load_shape

UNET, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
PROMPTS = ["a giraffe", "Two BROWN dogs, one with a red ball! " * 9, ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        layout: write_pipeline(tmp_path_factory.mktemp("hub") / layout, layout)
        for layout in LAYOUT_NAMES
    }


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_folder_gives_what_stock_diffusers_gives(folders, layout):
    teacher, xl = load_teacher(str(folders[layout])), layout == "sdxl"
    if xl:
        stock = StableDiffusionXLPipeline.from_pretrained(folders[layout], add_watermarker=False)
    else:
        stock = StableDiffusionPipeline.from_pretrained(
            folders[layout], safety_checker=None, feature_extractor=None
        )
    stock.scheduler = PNDMScheduler.from_config(stock.scheduler.config, skip_prk_steps=True)
    stock.set_progress_bar_config(disable=True)
    assert (teacher.resolution, teacher.latent_size, teacher.text_tokens) == (16, 8, 77)
    assert teacher.guidance_scale == (5.0 if xl else 7.5) and teacher.name == str(folders[layout])

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"num_inference_steps": 4, "guidance_scale": teacher.guidance_scale}
    images = stock(PROMPTS[:2], generator=generators, **options).images
    for ours, theirs in zip(teacher.generate(PROMPTS[:2], (1, 2), 4), images, strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = stock.vae.encode(images).latent_dist.mean * (0.13025 if xl else 0.18215)
    assert torch.equal(teacher.encode_images(images), mean)


def test_text_states_are_clips_own(folders, tmp_path):
    """Start and end around the words, padded to 77 with the folder's own token, cut to 77."""
    tokenizer = CLIPTokenizer.from_pretrained(folders["sd2"] / "tokenizer")
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (3, 77)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokens.input_ids[2].tolist() == [start, end] + [0] * 75  # "!" is number 0
    encoder = CLIPTextModel.from_pretrained(folders["sd2"] / "text_encoder").eval()
    with torch.no_grad():
        states = encoder(tokens.input_ids).last_hidden_state
    assert torch.equal(load_teacher(str(folders["sd2"])).conditions(PROMPTS).text, states)
    folder = tmp_path / "boundless"  # a tokenizer that does not say where the encoder ends
    shutil.copytree(folders["sd2"], folder)
    edit("tokenizer/tokenizer_config.json", model_max_length=10**30)(folder)
    assert torch.equal(load_teacher(str(folder)).conditions(PROMPTS).text, states)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_timesteps_are_those_that_pndm_can_follow(folders, tmp_path, spacing):
    """Its step is always 1000 // 30; other spacings would leave noise."""
    folder = tmp_path / "teacher"
    shutil.copytree(folders["sd2"], folder)
    edit("scheduler/scheduler_config.json", timestep_spacing=spacing)(folder)
    scheduler = load_teacher(str(folder)).pipe.scheduler
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[2:].tolist() == list(range(1 + 28 * 33, 0, -33))


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_the_target_is_what_the_folder_was_trained_to_predict(folders, layout):
    """From the definitions: x_0 of the noise (SD 1), or of the velocity (SD 2)."""
    teacher = load_teacher(str(folders[layout]))
    x0 = torch.randn(16, 4, 8, 8)
    batch = add_noise(teacher, x0, Conditions(torch.zeros(16, 77, 16)), step_generator(0, "test"))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[batch.t].float()[:, None, None, None]
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    if layout == "sd1":
        assert torch.allclose(signal * x0 + noise * batch.target, batch.sample, atol=1e-5)
    else:
        assert torch.allclose(signal * batch.sample - noise * batch.target, x0, atol=1e-4)


def test_the_pocket_teacher_saved_as_a_plain_folder_is_the_same_teacher(tmp_path):
    pocket = load_teacher("pocket")
    pocket.pipe.save_pretrained(tmp_path)
    plain = load_teacher(str(tmp_path))
    assert (plain.guidance_scale, plain.resolution, plain.text_tokens) == (7.5, 64, 20)
    prompts = ["a giraffe, flat emoji", "", "a slice of pizza " * 20]
    assert torch.equal(plain.conditions(prompts).text, pocket.conditions(prompts).text)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(plain.encode_images(images), pocket.encode_images(images))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    images = [
        teacher.pipe(prompts[:1], generator=[torch.Generator().manual_seed(3)], **options).images
        for teacher in (plain, pocket)
    ]
    assert (images[0] == images[1]).all()
    write_json(tmp_path / "teacher.json", {"guidance_scale": 3.0, "resolution": 32})
    settled = load_teacher(str(tmp_path))
    assert (settled.guidance_scale, settled.resolution, settled.latent_size) == (3.0, 32, 4)
    assert load_teacher(str(tmp_path), resolution=128).latent_size == 16


def test_weights_in_shards(folders, tmp_path):
    stock = UNet2DConditionModel.from_pretrained(folders["sd2"] / "unet")
    folder = tmp_path / "sharded"
    shutil.copytree(folders["sd2"], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    stock.save_pretrained(folder / "unet", max_shard_size="2MB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    for name, weight in load_teacher(str(folder)).unet.state_dict().items():
        assert torch.equal(weight, stock.state_dict()[name])


@pytest.mark.parametrize("shards", [False, True])
def test_fp16_weights_are_taken_where_they_are_alone(folders, tmp_path, shards):
    folder = tmp_path / "teacher"
    shutil.copytree(folders["sd2"], folder)
    size = {"max_shard_size": "20KB"} if shards else {}
    stock = {
        "unet": UNet2DConditionModel.from_pretrained(folders["sd2"] / "unet").half(),
        "text_encoder": CLIPTextModel.from_pretrained(folders["sd2"] / "text_encoder").half(),
    }
    for part, model in stock.items():
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(folder / part, variant="fp16", **size)
        assert (len(list((folder / part).glob("*.fp16*.safetensors"))) > 1) == shards
    teacher = load_teacher(str(folder))
    for part, model in stock.items():
        states = getattr(teacher.pipe, part).state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(states[name], weight.float()), name


WEIGHTS = ".safetensors"


@pytest.mark.parametrize(
    ("here", "half"),
    [
        (lambda name: ".fp16" not in name, False),
        (lambda name: not name.endswith(WEIGHTS) or name.endswith(f".fp16{WEIGHTS}"), True),
        (lambda name: "unet" not in name or f"el{WEIGHTS}" not in name, True),
        (lambda name: True, False),
    ],
    ids=["full", "fp16", "fp16 of the U-Net", "both"],
)
def test_of_the_hubs_files_those_that_diffusers_takes_must_be_there(
    folders, tmp_path, monkeypatch, here, half
):
    """Without other versions of a part, single files and a safety checker, listed on the hub."""
    folder, cache = tmp_path / "published", tmp_path / "cache"
    shutil.copytree(folders["sdxl"], folder)
    add_half_precision(folder)
    others = ("vae_1_0/config.json", f"vae_1_0/{UNET}", "sd_xl_base_1.0.safetensors")
    others += (f"safety_checker/{TEXT}", "vae_decoder/model.onnx", "unet/openvino_model.xml")
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    put_in_hub_cache(folder, cache, "some/xl", lambda name: here(name) and name not in others)
    found = load_teacher("some/xl").unet.state_dict()
    wanted = load_file(folder / "unet" / UNET)
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name].half().float() if half else wanted[name])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(folder): the folder as the model `some/model` of a hub; gives what was fetched of it."""

    def publish(folder):
        copy = tmp_path / "copy"
        copy.mkdir()

        def fetch(name, allow_patterns, ignore_patterns):
            assert name == "some/model"
            names = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
            for name in filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ):
                (copy / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, copy / name)
            return str(copy)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        return copy

    return publish


def test_only_what_a_pipeline_needs_is_fetched(folders, tmp_path, hub):
    """And of two precisions the full one, but for the U-Net, which has none."""
    folder = tmp_path / "published"
    shutil.copytree(folders["sd1"], folder)
    add_half_precision(folder)
    (folder / "unet" / UNET).unlink()
    write_json(folder / "teacher.json", {"guidance_scale": 3.5})
    needed = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    needed -= {
        f"vae/{UNET}".replace(WEIGHTS, f".fp16{WEIGHTS}"),
        f"text_encoder/model.fp16{WEIGHTS}",
    }
    for name in (
        "vae/diffusion_pytorch_model.bin",
        "v1-5.safetensors",
        "README.md",
        "unet/x.py",
        f"safety_checker/{TEXT}",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    fetched = hub(folder)
    teacher = load_teacher("some/model")
    assert {str(path.relative_to(fetched)) for path in fetched.rglob("*.*")} == needed
    assert teacher.guidance_scale == 3.5
    weights = load_file(folder / "unet" / UNET.replace(WEIGHTS, f".fp16{WEIGHTS}"))
    for name, weight in teacher.unet.state_dict().items():
        assert torch.equal(weight, weights[name].float())


def test_what_is_not_supported_is_known_before_weights_are_fetched(folders, tmp_path, hub):
    folder = tmp_path / "published"
    shutil.copytree(folders["sd2"], folder)
    edit("unet/config.json", num_class_embeds=10)(folder)
    fetched = hub(folder)
    with pytest.raises(UserError, match="num_class_embeds 10"):
        load_teacher("some/model")
    assert not list(fetched.rglob(f"*{WEIGHTS}"))


@pytest.mark.parametrize("lost", [f"vae/{UNET}", "tokenizer/merges.txt", "unet/config.json"])
def test_what_is_not_in_the_hubs_cache_is_one_line(folders, tmp_path, monkeypatch, lost):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_in_hub_cache(folders["sd1"], tmp_path, "some/model", lambda name: name != lost)
    with pytest.raises(UserError, match=r"some/model .*cache.*hf download some/model") as caught:
        load_teacher("some/model")
    assert "\n" not in str(caught.value)


# ---- what is refused ----


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(name, **changes):
    def change(folder):
        value = json.loads((folder / name).read_text())
        write_json(folder / name, value | changes)

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def pickle(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def lose_a_weight(part, file):
    def lose(folder):
        path = folder / part / file
        states = load_file(path)
        del states[sorted(states)[5]]
        save_file(states, path, {"format": "pt"})

    return lose


def remake_unet(**changes):
    def remake(folder):
        shutil.rmtree(folder / "unet")
        UNet2DConditionModel(**LAYOUTS["sd2"] | changes).save_pretrained(folder / "unet")

    return remake


def simple_attention(where):
    blocks = {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }
    return remake_unet(**{where: blocks[where]})


FAULTS = {
    "no index": (remove("model_index.json"), "model_index.json.*hf download"),
    "index no JSON": (
        write("model_index.json", "{"),
        "model_index.json is not valid JSON .*; fetch it again.*hf download",
    ),
    "index a list": (write("model_index.json", "[]"), "model_index.json"),
    "another pipeline": (
        edit("model_index.json", _class_name="StableDiffusion3Pipeline"),
        r"StableDiffusion3Pipeline; Stable Diffusion 1.x, 2.x and SDXL's base model",
    ),
    "SDXL in name": (
        edit("model_index.json", _class_name="StableDiffusionXLPipeline"),
        r"text_encoder_2 is a \(nothing\)",
    ),
    "inpainting": (
        edit("model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "StableDiffusionInpaintPipeline",
    ),
    "code of its own": (
        edit("model_index.json", _class_name=["pipeline", "Mine"]),
        "Mine.*supported",
    ),
    "another U-Net": (
        edit("model_index.json", unet=["my_unet", "MyUNet"]),
        "MyUNet, not a UNet2DConditionModel",
    ),
    "no text encoder": (edit("model_index.json", text_encoder=[None, None]), "text_encoder"),
    "T5": (
        edit("model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "T5EncoderModel",
    ),
    "no U-Net's config": (remove("unet/config.json"), "unet/config.json is missing.*hf download"),
    "no tokenizer": (remove("tokenizer/tokenizer_config.json"), "tokenizer_config.json is missing"),
    "no scheduler": (remove("scheduler/scheduler_config.json"), "scheduler_config.json is missing"),
    "no weights": (remove(f"unet/{UNET}"), "unet holds no safetensors"),
    "no text weights": (remove(f"text_encoder/{TEXT}"), "text_encoder holds no safetensors"),
    "pickled": (pickle, "unet holds no safetensors, and pickles are not read"),
    "U-Net cut short": (truncate(f"unet/{UNET}"), "unet could not be loaded"),
    "VAE cut short": (truncate(f"vae/{UNET}"), "vae could not be loaded"),
    "text cut short": (truncate(f"text_encoder/{TEXT}"), "text_encoder could not be loaded"),
    "U-Net lacks": (lose_a_weight("unet", UNET), "lacks 1 weights, such as"),
    "text lacks": (lose_a_weight("text_encoder", TEXT), "lacks 1 weights, such as"),
    "other shape": (edit("unet/config.json", block_out_channels=[32, 32]), "unet could not be"),
    "asks for size": (edit("unet/config.json", addition_embed_type="text_time"), "text_time"),
    "asks for class": (edit("unet/config.json", num_class_embeds=10), "num_class_embeds 10"),
    "flow matching": (
        write("scheduler/scheduler_config.json", '{"_class_name": "FlowMatchEulerDiscrete"}'),
        "FlowMatchEulerDiscrete",
    ),
    "predicts x_0": (edit("scheduler/scheduler_config.json", prediction_type="sample"), "sample"),
    "zero SNR": (edit("scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "DDIM"),
    "vocabulary": (write("tokenizer/vocab.json", "?"), "tokenizer could not be loaded"),
    # parts that do not fit together
    "text": (
        remake_unet(cross_attention_dim=24),
        "its U-Net's text states have width 24, and its text encoders give 16",
    ),
    "latents": (
        remake_unet(in_channels=9),
        "its U-Net's latents .* 9, and its autoencoder's are 4",
    ),
    "down": (simple_attention("down_block_types"), "SimpleCrossAttnDownBlock2D"),
    "middle": (simple_attention("mid_block_type"), "UNetMidBlock2DSimpleCrossAttn"),
    "up": (simple_attention("up_block_types"), "SimpleCrossAttnUpBlock2D"),
    "no size": (edit("unet/config.json", sample_size=None), "sample_size is None.*--resolution"),
    "sizes": (edit("unet/config.json", sample_size=[8, 8]), r"sample_size is .8, 8.*--resolution"),
    "factor": (
        edit("unet/config.json", sample_size=6),
        "U-Net's sample_size 6 times its autoencoder's factor 2 is not a multiple of 8",
    ),
    "usual": (
        write("teacher.json", '{"resolution": 20}'),
        "teacher.json's resolution 20 is not a multiple of 8 pixels; give --resolution 16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_one_line(folders, tmp_path, fault):
    folder = tmp_path / "teacher"
    shutil.copytree(folders["sd2"], folder)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(str(folder))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600
    if "--resolution" in line:
        assert load_teacher(str(folder), resolution=16).latent_size == 8
    else:
        assert str(folder) in line


def test_code_of_a_folder_is_not_run(folders, tmp_path):
    """Neither a module beside a part, nor one that a configuration names."""
    folder = tmp_path / "teacher"
    shutil.copytree(folders["sd2"], folder)
    for part in ("unet", "text_encoder", "tokenizer"):
        (folder / part / "mine.py").write_text("raise SystemExit('code of the folder was run')")
        file = "tokenizer_config.json" if part == "tokenizer" else "config.json"
        mapped = {"AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", "mine.Mine"]}
        edit(f"{part}/{file}", auto_map=mapped)(folder)
    load_teacher(str(folder))
    for entry in (["mine", "UNet2DConditionModel"], ["diffusers", "Mine"]):
        edit("model_index.json", unet=entry)(folder)
        with pytest.raises(UserError, match=f"its unet is a {'.'.join(entry)}, not a UNet2D"):
            load_teacher(str(folder))


def test_what_is_not_here_says_how_to_get_it(tmp_path):
    for name in (STABLE_DIFFUSION, "nobody/nothing"):
        with pytest.raises(UserError, match=f"hf download {name} --local-dir D.*pocket") as caught:
            load_teacher(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"unknown.*sd21-random"):
        load_teacher("sd3-random")
    with pytest.raises(UserError, match=r"unknown.*folder"):
        load_teacher(str(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file"):
        load_teacher(str(tmp_path / "model.safetensors"))


def test_a_model_in_the_hubs_cache_is_found_without_a_network(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--some--diffusion", "0" * 40
    shutil.copytree(folders["sd2"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    teacher = load_teacher("some/diffusion")
    assert teacher.name == "some/diffusion"
    there = load_teacher(str(folders["sd2"]))
    assert torch.equal(teacher.conditions(PROMPTS).text, there.conditions(PROMPTS).text)
    (repository / "snapshots" / commit / "vae" / UNET).unlink()
    with pytest.raises(UserError, match="vae holds no safetensors"):
        load_teacher("some/diffusion")


# ---- shapes with random weights ----


def test_every_shape_has_a_random_teacher():
    shapes = {path.stem for path in (ASSETS / "unets").glob("*.json")}
    assert {f"{shape}-random" for shape in shapes} | {"pocket"} == set(TEACHERS)


def test_the_random_sd21_is_the_published_shape(monkeypatch):
    """On the meta device, as far as the U-Net goes."""
    shape = load_shape("sd21")
    monkeypatch.setattr(pipelines, "with_random_weights", lambda *_: shape)
    pipe = random_pipeline("sd21")
    assert sum(p.numel() for p in pipe.unet.parameters()) == 865_910_724
    assert pipe.vae_scale_factor == 8 and pipe.vae.config.latent_channels == 4
    assert pipe.encode_prompt(["a giraffe", ""], "cpu", 1, False)[0].shape == (2, 77, 1024)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert sum(p.numel() for p in pipe.vae.parameters()) < 1e6


@pytest.fixture
def tiny_shape(tmp_path, monkeypatch):
    """`tiny-random`: a stand-in for the shapes in assets/unets/."""
    monkeypatch.setattr("teacher.shapes.ASSETS", tmp_path)
    monkeypatch.setattr("teacher.model.ASSETS", tmp_path)
    write_json(tmp_path / "unets" / "tiny.json", LAYOUTS["sd2"] | {"sample_size": 12})


def test_a_random_teacher_is_the_same_whenever_it_is_loaded(tiny_shape):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load_teacher("tiny-random", resolution=32)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_teacher("tiny-random", resolution=32)
    assert (first.resolution, first.latent_size) == (32, 4)
    assert load_teacher("tiny-random").resolution == 96
    for part in ("unet", "vae", "text_encoder"):
        ours, others = (getattr(t.pipe, part).state_dict() for t in (first, second))
        assert all(torch.equal(value, others[name]) for name, value in ours.items())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents, text = first.encode_images(images), first.conditions(PROMPTS[:2]).text
    assert latents.shape == (2, 4, 4, 4) and text.shape == (2, 77, 16)
    assert not torch.allclose(text[0], text[1])
    batch = add_noise(first, latents, Conditions(text), step_generator(0, "test"))
    with torch.no_grad():
        assert torch.isfinite(first.unet(**batch.inputs()).sample).all()
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    assert first.pipe(["a giraffe"], **size).images[0].size == (32, 32)


# ---- precision and size ----


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_holds_for_every_part(folders, precision):
    full, half = (load_teacher(str(folders["sd2"]), precision=p) for p in ("fp32", precision))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for part in (half.unet, half.pipe.vae, half.pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {dtype}
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    outputs = []
    for teacher in (full, half):
        x0, text = teacher.encode_images(images), teacher.conditions(["a giraffe"] * 4).text
        batch = add_noise(teacher, x0, Conditions(text), step_generator(0, "test"))
        assert x0.dtype == batch.target.dtype == torch.float32
        assert batch.sample.dtype == batch.conditions.text.dtype == teacher.dtype
        with torch.no_grad():
            outputs.append(teacher.unet(**batch.inputs()).sample.float())
    error = (outputs[0] - outputs[1]).square().mean() / outputs[0].square().mean()
    assert 0 < error < 1e-2


def test_an_autoencoder_that_overflows_is_refused(folders):
    teacher = load_teacher(str(folders["sd2"]), precision="fp16")
    teacher.pipe.vae.quant_conv.weight.mul_(6e4)
    teacher.pipe.vae.quant_conv.bias.fill_(6e4)
    with pytest.raises(UserError, match=r"not finite.*bf16"):
        teacher.encode_images(torch.ones(1, 3, 16, 16))


def test_sizes_and_precisions_that_cannot_be(folders, tmp_path):
    for resolution in (-2, 0, 1, 10, 33):
        with pytest.raises(UserError, match=f"--resolution {resolution} .*multiple of 8"):
            load_teacher(str(folders["sd2"]), resolution=resolution)
    with pytest.raises(UserError, match=r"--precision int8.*bf16"):
        load_teacher(str(folders["sd2"]), precision="int8")
    folder = tmp_path / "teacher"
    shutil.copytree(folders["sd2"], folder)
    edit("unet/config.json", sample_size=None)(folder)
    with pytest.raises(UserError, match="--resolution"):
        load_teacher(str(folder))
    assert load_teacher(str(folder), resolution=32).latent_size == 16


def test_a_deep_compression_autoencoder_is_diffusers_own():
    config = read_json(ASSETS / "pocket" / "vae" / "config.json")
    ours, stock = (of.from_config(config).eval() for of in (parts.AutoencoderDC, AutoencoderDC))
    stock.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = stock.encode(images).latent
        assert torch.equal(ours.encode(images).latents, latents)
        assert torch.equal(ours.decode(latents).sample, stock.decode(latents).sample)


@pytest.mark.parametrize("masked", [True, False])
def test_the_first_state_is_the_mean_only_where_the_configuration_says_so(masked):
    """By transformers' own BERT."""
    torch.manual_seed(0)
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30, intermediate_size=8, **size)
    stock = transformers.BertModel(config).eval()
    ours = parts.BertModel(config).eval()
    ours.load_state_dict(stock.state_dict())
    ids = torch.randint(0, 30, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    with torch.no_grad():
        states = stock(ids, attention_mask=mask)[0]
        assert torch.equal(ours(ids, attention_mask=mask)[0], states)
        ours.config.sentence_state = True
        found = ours(ids, attention_mask=mask)[0]
    assert torch.equal(found[:, 1:], states[:, 1:])
    counted = [3 if masked else 5, 5]
    for row, count in enumerate(counted):
        assert torch.allclose(found[row, 0], states[row, :count].mean(0), atol=1e-6)

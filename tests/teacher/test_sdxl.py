"""SDXL: what its U-Net is told, against the stock pipeline of diffusers; what is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from small_data import make_coco
from small_pipelines import write_pipeline

from common.errors import UserError
from common.files import read_json, write_json
from common.randomness import step_generator
from targets.images import load_target
from teacher.conditions import Conditions
from teacher.encoded import encode_target
from teacher.model import add_noise, load_teacher

PROMPTS = ["a giraffe", "Two BROWN dogs, one with a red ball! " * 9]
WAYS = [{}, {"in_memory": 0}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("hub") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def edit(path, **changes):
    write_json(path, read_json(path) | changes)


def same(found: Conditions, text: torch.Tensor, added: dict[str, torch.Tensor]) -> None:
    assert torch.allclose(found.text, text, atol=1e-5)
    assert torch.allclose(found.pooled, added["text_embeds"], atol=1e-5)
    assert torch.equal(found.time_ids, added["time_ids"])


@pytest.mark.parametrize("zeros", [True, False])
def test_conditions_are_what_the_stock_pipeline_gives_its_unet(folder, tmp_path, zeros):
    """With guidance: the first half is the empty caption's, zero or encoded as the folder says."""
    place = tmp_path / "sdxl"
    shutil.copytree(folder, place)
    edit(place / "model_index.json", force_zeros_for_empty_prompt=zeros)
    stock, seen = StableDiffusionXLPipeline.from_pretrained(place, add_watermarker=False), []
    stock.scheduler = PNDMScheduler.from_config(stock.scheduler.config, skip_prk_steps=True)
    stock.set_progress_bar_config(disable=True)
    stock.unet.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    stock(PROMPTS, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    text, added = seen[0]["encoder_hidden_states"], seen[0]["added_cond_kwargs"]
    teacher = load_teacher(str(place))
    conditions, empty = teacher.conditions(PROMPTS), teacher.empty_conditions()
    same(conditions, text[2:], {key: value[2:] for key, value in added.items()})
    same(empty, text[:1], {key: value[:1] for key, value in added.items()})
    assert (empty.text.abs().max() == 0) == (empty.pooled.abs().max() == 0) == zeros
    assert not torch.allclose(conditions.pooled[0], conditions.pooled[1])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_rows_are_told_their_real_sizes(teacher, tmp_path, monkeypatch, way):
    """Photographs of 40 x 30 pixels, of which 16 x 16 are left: 2.67 = (21.33 - 16) / 2 off."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_coco(tmp_path)
    data = load_target("coco", "train", data_dir=tmp_path, resolution=16)
    encoded = encode_target(teacher, data, **way)
    rows = torch.tensor([3, 11, 0, 5, 5])
    _, conditions = encoded.batch(rows)
    assert conditions.time_ids.tolist() == [[30.0, 40.0, 0.0, 3.0, 16.0, 16.0]] * 5
    other = data.take(range(len(data))[::-1])  # each image has its own size now
    ids = other.image_ids
    other = replace(other, frame=lambda row: (int(ids[row]), 40, 0, 3))
    shutil.rmtree(next((tmp_path / "cache" / "aptp").glob("frames-*")))
    _, told = encode_target(teacher, other, **way).batch(rows)
    assert told.time_ids[:, 0].tolist() == ids[rows].tolist()
    wanted = teacher.conditions([data.captions[row] for row in rows.tolist()])
    assert torch.allclose(conditions.text, wanted.text, atol=1e-5)
    assert torch.allclose(conditions.pooled, wanted.pooled, atol=1e-5)
    part = data.take([4, 2])
    assert part.frames([0, 1]).tolist() == [[30, 40, 0, 3]] * 2


def test_rendered_images_are_whole():
    data = load_target("emoji", "validation", limit=3, resolution=24)
    assert data.frames(torch.arange(3)).tolist() == [[24, 24, 0, 0]] * 3


def test_a_dropped_caption_takes_both_of_its_encodings_and_no_size(teacher):
    conditions = teacher.conditions(PROMPTS * 2, torch.arange(16).view(4, 4))
    empty, dropped = teacher.empty_conditions(), torch.tensor([True, False, False, True])
    found = conditions.drop(dropped, empty)
    for row, gone in enumerate(dropped.tolist()):
        own = empty if gone else conditions[torch.tensor([row])]
        assert torch.equal(found.text[row], own.text[0])
        assert torch.equal(found.pooled[row], own.pooled[0])
    assert torch.equal(found.time_ids, conditions.time_ids)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("upcast", [True, False])
def test_the_autoencoder_stays_fp32_where_the_folder_says_so(folder, tmp_path, precision, upcast):
    place = tmp_path / "sdxl"
    shutil.copytree(folder, place)
    edit(place / "vae" / "config.json", force_upcast=upcast)
    teacher = load_teacher(str(place), precision=precision)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    found = {name: next(part.parameters()).dtype for name, part in teacher.parts.items()}
    assert found.pop("vae") == (torch.float32 if upcast else half)
    assert set(found.values()) == {half} and len(found) == 3
    conditions = teacher.conditions(PROMPTS, torch.tensor([[427, 641, 0, 3]] * 2))
    x0 = teacher.encode_images(torch.rand(2, 3, 16, 16) * 2 - 1)
    batch = add_noise(teacher, x0, conditions, step_generator(0, "test"))
    assert batch.conditions.text.dtype == batch.conditions.pooled.dtype == half
    assert batch.conditions.time_ids[0].tolist() == [427, 641, 0, 3, 16, 16]  # bf16 has no 427
    with torch.no_grad():
        assert torch.isfinite(teacher.unet(**batch.inputs()).sample).all()
    assert teacher.generate(PROMPTS, (0, 1), 2)[1].size == (16, 16)


def index(**changes):
    return lambda place: edit(place / "model_index.json", **changes)


def unet(**changes):
    return lambda place: edit(place / "unet" / "config.json", **changes)


def nine_channels(place):
    config = read_json(place / "unet" / "config.json") | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(place / "unet")


def narrow_pooled(place):
    config = read_json(place / "unet" / "config.json")
    config |= {"projection_class_embeddings_input_dim": 6 * 8 + 12}
    UNet2DConditionModel.from_config(config).save_pretrained(place / "unet")


FAULTS = {
    "refiner": (index(_class_name="StableDiffusionXLImg2ImgPipeline"), "XLImg2ImgPipeline; .*base"),
    "refiner's parts": (index(text_encoder=[None, None]), r"text_encoder is a \(nothing\)"),
    "inpainting": (index(_class_name="StableDiffusionXLInpaintPipeline"), "Inpaint"),
    "inpainting U-Net": (nine_channels, "latents have width 9, and its autoencoder's are 4"),
    "IP adapter": (unet(encoder_hid_dim_type="ip_image_proj"), "ip_image_proj"),
    "text alone": (
        unet(addition_embed_type=None),
        "addition_embed_type is None, unlike a StableDiffusionXLPipeline",
    ),
    "distilled guidance": (unet(time_cond_proj_dim=256), "time_cond_proj_dim 256"),
    "one CLIP": (index(text_encoder_2=[None, None]), "text_encoder_2"),
    "other CLIP": (
        index(text_encoder_2=["transformers", "CLIPTextModel"]),
        "not a CLIPTextModelWithProjection",
    ),
    "no second tokenizer": (
        lambda place: shutil.rmtree(place / "tokenizer_2"),
        "tokenizer_2/tokenizer_config.json is missing",
    ),
    "pooled text": (
        narrow_pooled,
        "pooled text have width 12, and its second text encoder gives 16",
    ),
    "shifted latents": (
        lambda place: edit(place / "vae" / "config.json", latents_mean=[0.1] * 4),
        "latents_mean",
    ),
    "EDM": (
        lambda place: write_json(
            place / "scheduler" / "scheduler_config.json", {"_class_name": "EDMEulerScheduler"}
        ),
        "EDMEulerScheduler",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_sdxls_base_model_is_refused_in_one_line(folder, tmp_path, fault):
    place = tmp_path / "sdxl"
    shutil.copytree(folder, place)
    spoil, message = FAULTS[fault]
    spoil(place)
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(str(place))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600 and str(place) in line

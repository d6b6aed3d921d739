"""Publishing: a run becomes a folder that diffusers loads.

    python -m sharing.publish --run runs/emoji-0.5 --out my_model
    python -m sharing.publish --run runs/emoji-0.5 --out my_expert --expert 3

Then, anywhere, without this repository:

    pipe = DiffusionPipeline.from_pretrained("my_model", trust_remote_code=True)
    pipe(["a giraffe", "a slice of pizza"]).images

`hf upload OWNER/NAME my_model` puts the folder on the hub.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError, command_line
from common.files import check_writable, remove_leftovers, temporary_folder, write_json
from common.hub import CONTENT, HUB_NAME, MAX_PROMPT_CHARACTERS, model_files
from common.options import read_options
from common.ranges import Number, Precision, check
from gates import ArchSpace, inside, removed_layers
from run import newest_run, read_run
from sample import APTPPipeline
from sharing.card import model_card, published_summary
from sharing.pruned_unet import PrunedUNet2DConditionModel, RoutedUNet
from teacher import parts

HERE = Path(__file__).resolve().parent
STEPS = 25  # of PNDM, the paper's


@dataclass(frozen=True)
class Config:
    """Publishing a run as a folder of its own."""

    HEADINGS: ClassVar = {"run": "what is published", "encoder_by_name": "how"}
    run: Path | None = None
    """Run folder; the newest run if not given."""
    out: Path | None = None
    """A new folder; <run>/published if not given."""
    expert: Number | None = None
    """This expert alone, as an ordinary single model."""
    encoder_by_name: bool = False
    """The folder names the prompt encoder's hub id instead of holding the encoder."""
    license: str | None = None
    """As the hub calls it; the teacher's, where that is known."""
    precision: Precision = "fp32"
    """Of the weights."""


def kept_units(space: ArchSpace, code: Tensor) -> dict[str, str]:
    """What a binary code leaves of each layer that it cuts, as `pruned_unet.py` reads it."""
    removed = removed_layers(code, space)
    kept = {
        layer.name: "".join(str(int(unit)) for unit in code[layer.span])
        for layer in space.width_layers
        if not inside(layer, removed)
    }
    return {name: units for name, units in kept.items() if "0" in units} | dict.fromkeys(
        removed, "0"
    )


def write_unet(pipeline: APTPPipeline, folder: Path, expert: int | None) -> list[str]:
    """The run's experts, or one of them, with one at a time in memory.

    Returns their entry in model_index.json.
    """
    config, N = pipeline.teacher.unet.config, len(pipeline.codes)
    dense = {key: value for key, value in config.items() if not key.startswith("_")}
    dense["sample_size"] = pipeline.teacher.latent_size  # by which diffusers sizes images
    places = {i: folder / str(i) for i in range(N)} if expert is None else {expert: folder}
    for i, place in places.items():
        kept = kept_units(pipeline.space, pipeline.codes[i])
        with torch.device("meta"):  # shapes without weights
            unet = PrunedUNet2DConditionModel(**dense, kept=kept)
        unet.load_state_dict(pipeline.made(i).state_dict(), assign=True)
        unet.save_pretrained(place)
    if expert is None:
        RoutedUNet(N, **dense).save_config(folder)
    shutil.copy(HERE / "pruned_unet.py", folder)
    kind = RoutedUNet if expert is None else PrunedUNet2DConditionModel
    return ["pruned_unet", kind.__name__]


def write_router(pipeline: APTPPipeline, folder: Path, by_name: bool) -> None:
    """The router's folder, which `prompt_router.py` reads."""
    router, encoder = pipeline.router, pipeline.encoder
    folder.mkdir()
    shutil.copy(HERE / "prompt_router.py", folder)
    tensors = {
        "mean_z": router.mean_z,
        "content": router.content,
        "weight": router.predictor.weight,
        "bias": router.predictor.bias,
        "keys": router.keys if router.own_keys else router.codes - router.predictor.bias,
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "router.safetensors", {"format": "pt"})
    settings = {
        "center": router.center,
        "encoder": encoder.name if by_name else None,
        "max_characters": MAX_PROMPT_CHARACTERS,
    }
    write_json(folder / "config.json", settings)
    for file in [] if by_name else model_files(encoder.folder):
        if file.suffix in CONTENT:
            place = folder / "encoder" / file.relative_to(encoder.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def write_part(part: Any, folder: Path) -> list[str]:
    """One of a pipeline's parts, and the Python that it needs; its entry in model_index.json."""
    part.save_pretrained(folder)
    library = type(part).__module__.partition(".")[0]
    if library == "teacher":
        shutil.copy(parts.__file__, folder)
        library = Path(parts.__file__).stem
    return [library, type(part).__name__]


def write_pipeline(pipeline: APTPPipeline, folder: Path, cfg: Config) -> None:
    """All of the folder but its model card."""
    teacher = pipeline.teacher
    kind = type(teacher.pipe).__name__
    index: dict[str, Any] = {"_class_name": kind}
    for name, part in teacher.pipe.components.items():
        if name == "unet":
            index[name] = write_unet(pipeline, folder / name, cfg.expert)
        else:
            index[name] = [None, None] if part is None else write_part(part, folder / name)
    for setting in ("requires_safety_checker", "force_zeros_for_empty_prompt"):
        if setting in teacher.pipe.config:
            index[setting] = teacher.pipe.config[setting]
    if cfg.expert is None:
        shutil.copy(HERE / "pipeline.py", folder)
        write_router(pipeline, folder / "router", cfg.encoder_by_name)
        index |= {
            "_class_name": ["pipeline", f"Routed{'XL' * ('XL' in kind)}Pipeline"],
            "router": ["prompt_router", "PromptRouter"],
            "guidance_scale": teacher.guidance_scale,
            "num_inference_steps": STEPS,
        }
    write_json(folder / "model_index.json", index)


def write_card(pipeline: APTPPipeline, folder: Path, cfg: Config) -> None:
    """The model card, what it says as summary.json, and the images that it shows."""
    names = ("summary.json", "config.json", "assignments.json")
    summary, settings, assigned = read_run(pipeline.run, *names)
    summary, samples = published_summary(summary, pipeline), None
    if cfg.expert is not None:
        summary["experts"] = [summary["experts"][cfg.expert]]
    elif (grid := pipeline.run / "report" / "samples.png").exists():
        samples = "samples.webp"
        with Image.open(grid) as image:
            image.thumbnail((1000, 4000))
            image.convert("RGB").save(folder / samples, quality=75)
    about: dict[str, Any] = {"expert": cfg.expert, "license": cfg.license, "samples": samples}
    card = model_card(summary, settings, prompts=len(assigned["train"]), **about)
    write_json(folder / "summary.json", summary)
    (folder / "README.md").write_text(card, encoding="utf-8")


def publish(cfg: Config) -> Path:
    """Write the folder, whole or not at all.

    Raises `UserError` for what the user can mend.
    """
    check(cfg)
    run = cfg.run or newest_run()
    out = cfg.out or run / "published"
    if out.exists():
        raise UserError(f"--out {out} exists; choose a new folder, or remove that one")
    summary, *_ = read_run(run, "summary.json", "config.json", "assignments.json")
    if cfg.expert is not None and cfg.expert >= (N := summary["num_experts"]):
        raise UserError(f"--expert {cfg.expert} is not in {run}; choose one of 0 to {N - 1}")
    check_writable(out)
    pipeline = APTPPipeline.from_pretrained(run, "cpu", precision=cfg.precision)
    if cfg.encoder_by_name and not HUB_NAME.fullmatch(name := pipeline.encoder.name):
        raise UserError(
            f"--encoder-by-name: the run's prompt encoder {name} is not named by a hub id; leave "
            f"the option out, and the folder holds the encoder"
        )
    remove_leftovers(out.parent, out.name)
    folder, lock = temporary_folder(out)
    try:
        whole = folder / out.name
        whole.mkdir()
        write_pipeline(pipeline, whole, cfg)
        write_card(pipeline, whole, cfg)
        os.rename(whole, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.close()
    return out


def main() -> None:
    out = publish(read_options(Config, __doc__))
    print(f"{out}: DiffusionPipeline.from_pretrained({str(out)!r}, trust_remote_code=True)")


if __name__ == "__main__":
    command_line(main)

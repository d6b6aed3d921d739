"""The fine-tuning stage: Sec. 3.4 and App. D.5, Eq. 30.

    python finetune.py                       # every expert of the newest run
    python finetune.py --run runs/emoji-0.64 --expert 3
    torchrun --nproc-per-node 8 -- finetune.py --run runs/coco-0.78  # shared out among processes

Each expert is cut out of the teacher and trained, all weights, on the training prompts that the
router sends to it, with the teacher's output and block outputs as targets. Experts do not depend on
each other: one job an expert is fine. A finished expert is not trained again; a killed one goes on
from its last checkpoint.

What differs from the paper: docs/departures.md#finetune.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import trange

import losses
from common.checkpoint import Checkpoint, refuse_other_settings
from common.errors import UserError, command_line
from common.files import MetricsLog, load_tensors, remove_leftovers
from common.options import read_options
from common.processes import leave_processes, pick_device, rank, start_processes, world_size
from common.randomness import batch_rows, step_generator
from common.ranges import check
from gates import ArchSpace
from prune_unet import BlockRecorder, cut_expert, find_units, save_expert
from run import (
    check_expert,
    expert_path,
    load_codes,
    load_run_teacher,
    load_split,
    newest_run,
    read_run,
)
from settings import TUNED_BY, Finetuning, finetuning_of
from teacher.conditions import Conditions
from teacher.encoded import Encoded, encode_target
from teacher.model import Noised, Teacher, add_noise, load_teacher

TERMS = ("loss", "denoising", "distillation")


def checkpoint_path(run: Path, expert: int) -> Path:
    """Where a run keeps an expert that is being fine-tuned, and its optimizer."""
    return run / "experts" / f"{expert}.checkpoint.safetensors"


def made_with(cfg: Finetuning) -> dict[str, object]:
    """The settings that an expert depends on."""
    return {name: getattr(cfg, name) for name in TUNED_BY}


def finetuning_step(
    teacher: Teacher,
    expert: UNet2DConditionModel,
    recorders: tuple[BlockRecorder, BlockRecorder],
    batch: Noised,
    cfg: Finetuning,
) -> dict[str, Tensor]:
    """Eq. 30 for one batch: sets the expert's gradients, returns the loss and its terms, scalars.

    One micro-batch at a time, each weighted by its share of the batch.
    """
    B, dtype = len(batch.sample), teacher.dtype
    total = torch.zeros(3)  # the loss and its two terms
    scale = losses.loss_scale(dtype)
    for part in torch.arange(B).split(cfg.micro_batch):
        inputs = batch.part(part)
        with torch.no_grad():
            teacher_output = teacher.unet(**inputs.inputs()).sample
        with torch.autocast(teacher.device.type, dtype, enabled=dtype != torch.float32):
            output = expert(**inputs.inputs()).sample
        teacher_blocks, blocks = (recorder.take() for recorder in recorders)
        denoising = losses.denoising_loss(output, inputs.target)  # (b,)
        distillation = losses.distillation_loss(
            output,
            teacher_output,
            blocks,
            teacher_blocks,
            normalise=cfg.normalise_blocks,
            block_weight=cfg.block_weight,
        )  # (b,)
        loss = losses.finetuning_loss(denoising, distillation, cfg.alpha_ddpm, cfg.alpha_distill)
        share = len(part) / B
        (scale * share * loss).backward()
        terms = torch.stack([loss, denoising.mean(), distillation.mean()])
        total += share * terms.detach().float().cpu()
    if scale != 1:
        for parameter in expert.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
    return dict(zip(TERMS, total, strict=True))


def finetune_expert(
    cfg: Finetuning,
    run: Path,
    i: int,
    *,
    teacher: Teacher,
    dense: UNet2DConditionModel,
    space: ArchSpace,
    code: Tensor,
    data: Encoded,
    empty: Conditions,
    rows: Tensor,
) -> None:
    """Train expert `i` on its rows, from its last checkpoint, and write it to the run.

    Args:
        teacher: what it learns from, in the run's precision.
        dense: the teacher's U-Net in float32, which the expert is cut out of.
        data: the training rows, encoded.
        empty: conditions of one image, with the empty caption.
        rows: row numbers, (R,).
    """
    path = expert_path(run, i)
    remove_leftovers(path.parent, f"{i}.*")
    expert = cut_expert(dense, code, space).to(teacher.device).requires_grad_(True)
    if cfg.checkpointing:
        expert.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=cfg.lr)
    checkpoint = Checkpoint(
        checkpoint_path(run, i), {"expert": expert, "optimizer": optimizer}, made_with(cfg)
    )
    first = checkpoint.restore().get("step", 0)
    recorders = (BlockRecorder(teacher.unet), BlockRecorder(expert))
    log = MetricsLog(run / "experts" / f"{i}.csv", list(TERMS), first)
    bar = trange(
        first, cfg.steps, initial=first, total=cfg.steps, desc=f"expert {i}", position=rank()
    )
    for step in bar:
        generator = step_generator(cfg.seed, f"finetune {i}", step)
        pick = rows[batch_rows(len(rows), cfg.batch_size, cfg.seed, step)]  # (b,)
        latents, conditions = data.batch(pick)
        dropped = torch.rand(len(pick), generator=generator) < cfg.caption_dropout  # (b,)
        batch = add_noise(teacher, latents, conditions.drop(dropped, empty), generator)
        optimizer.zero_grad(set_to_none=True)
        terms = finetuning_step(teacher, expert, recorders, batch, cfg)
        values = {name: terms[name].item() for name in TERMS}
        advice = f"expert {i}: try a lower --lr, or --precision fp32 or bf16"
        checkpoint.guard(step, values["loss"], expert.parameters(), advice)
        optimizer.step()
        log.write(step, values)
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            checkpoint.save(step=step + 1)
    log.close()
    for recorder in recorders:
        recorder.detach()
    meta = {"expert": i, "rows": len(rows), "settings": made_with(cfg)}
    save_expert(path, expert, code, space, meta)
    checkpoint.path.unlink(missing_ok=True)


def first_and_last(run: Path, i: int) -> tuple[float, float]:
    """Mean distillation loss over the first and the last tenth of the steps, from the log."""
    with (run / "experts" / f"{i}.csv").open(newline="", encoding="utf-8") as file:
        values = [float(row["distillation"]) for row in csv.DictReader(file)]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def unfinished(cfg: Finetuning, run: Path, wanted: list[int]) -> list[int]:
    """Those of the experts that are not fine-tuned yet.

    Raises `UserError` where one was fine-tuned with other settings, or is another run's.
    """
    todo, codes = [], load_codes(run)
    for i in wanted:
        if expert_path(run, i).exists():
            header = load_tensors(expert_path(run, i))[1]
            check_expert(expert_path(run, i), header, codes[i])
            refuse_other_settings(expert_path(run, i), header["settings"], made_with(cfg))
            checkpoint_path(run, i).unlink(missing_ok=True)  # where a kill came just before
        else:
            todo.append(i)
    return todo


def finetune(cfg: Finetuning) -> None:
    """Fine-tune the experts of a run that are not done yet.

    Raises `UserError` for what the user can mend.
    """
    check(cfg)
    run = cfg.run or newest_run()
    names = ("summary.json", "config.json", "assignments.json")
    summary, settings, assigned = read_run(run, *names)
    N = summary["num_experts"]
    if cfg.expert is not None and not 0 <= cfg.expert < N:
        raise UserError(f"--expert {cfg.expert} is not in {run}; choose one of 0 to {N - 1}")
    device = start_processes(pick_device(cfg.device))
    wanted = [cfg.expert] if cfg.expert is not None else list(range(N))
    todo = unfinished(cfg, run, wanted)
    if not todo:
        print(f"{run}: all of the experts asked for are fine-tuned already")
        leave_processes()
        return

    options = {"precision": cfg.precision, "resolution": summary["resolution"]}
    teacher = load_run_teacher(run, cfg.teacher, device, **options)
    # experts start from the weights as they are, not as the precision rounds them
    dense = teacher.unet if cfg.precision == "fp32" else load_teacher(teacher.name).unet
    space = find_units(dense, settings["depth"])
    codes = load_codes(run, space)
    data = load_split(run, settings, assigned, "train", teacher.resolution, cfg.data_dir)
    assignment = torch.tensor(assigned["train"])  # (rows,)
    encoded = encode_target(teacher, data, cache_latents=settings["cache_latents"])
    empty = teacher.empty_conditions().to("cpu")
    leave_processes()  # from here on nothing is shared, and none waits for another
    for i in [i for i in wanted[rank() :: world_size()] if i in todo]:
        own = (assignment == i).nonzero().flatten()  # (R,)
        clock = time.time()
        finetune_expert(
            cfg,
            run,
            i,
            teacher=teacher,
            dense=dense,
            space=space,
            code=codes[i],
            data=encoded,
            empty=empty,
            rows=own if len(own) else torch.arange(len(data)),
        )
        before, after = first_and_last(run, i)
        print(
            f"expert {i}: {len(own)} prompts, {cfg.steps} steps in {time.time() - clock:.0f} s, "
            f"distillation loss {before:.4f} -> {after:.4f}, {expert_path(run, i)}"
        )


def read_finetuning(arguments: list[str], description: str | None) -> Finetuning:
    """`Finetuning` from arguments; the run's target sets what they do not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", type=Path)
    if {"-h", "--help"} & set(arguments):
        return read_options(Finetuning, description, arguments)
    run = parser.parse_known_args(arguments)[0].run or newest_run()
    (summary,) = read_run(run, "summary.json")
    return read_options(Finetuning, description, arguments, finetuning_of(summary["target"]))


def main() -> None:
    finetune(read_finetuning(sys.argv[1:], __doc__))


if __name__ == "__main__":
    command_line(main, goes_on=True)

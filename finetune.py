"""The fine-tuning stage: Sec. 3.4 and App. D.5, Eq. 30.

    python finetune.py                       # every expert of the newest run
    python finetune.py --steps 0             # no training: experts are refitted in closed form
    python finetune.py --run runs/emoji-0.5 --expert 3
    python finetune.py --shared --steps 800  # one set of weights, which all experts are cut out of
    torchrun --nproc-per-node 8 -- finetune.py --run runs/coco-0.78  # shared out among processes

Each expert is cut out of the teacher, refitted (`refit.py`), and trained, all weights, on the
training prompts that the router sends to it, with the teacher's output and block outputs as
targets. Experts do not depend on each other: one job an expert is fine. With `--shared` the U-Net
itself is trained through the hard gates of each sample's expert; a run that holds such weights has
its experts cut out of them. A finished expert is not made again; a killed one goes on from its
last checkpoint.

What differs from the paper: docs/departures.md#finetune.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import trange

import losses
from common.ahead import ahead
from common.checkpoint import Checkpoint, refuse_other_settings
from common.errors import UserError, command_line
from common.files import MetricsLog, fingerprint, load_tensors, remove_leftovers, save_tensors
from common.options import read_options
from common.processes import (
    check_agreement,
    leave_processes,
    pick_device,
    rank,
    start_processes,
    world_size,
)
from common.randomness import batch_rows, step_generator
from common.ranges import check
from gates import ArchSpace
from prune_unet import (
    BlockRecorder,
    GateHandle,
    attach_gates,
    cut_expert,
    find_units,
    save_expert,
)
from refit import refit
from run import (
    check_expert,
    expert_path,
    load_codes,
    load_run_teacher,
    load_shared,
    load_split,
    newest_run,
    read_run,
    shared_path,
)
from settings import TUNED_BY, Finetuning, finetuning_of
from teacher.conditions import Conditions
from teacher.encoded import Encoded, encode_target
from teacher.model import Noised, Teacher, add_noise, load_teacher

TERMS = ("loss", "denoising", "distillation")


def checkpoint_path(run: Path, name: str) -> Path:
    """Where a run keeps weights that are being fine-tuned, and their optimizer."""
    return run / "experts" / f"{name}.checkpoint.safetensors"


def made_with(cfg: Finetuning) -> dict[str, object]:
    """The settings that an expert depends on."""
    return {name: getattr(cfg, name) for name in TUNED_BY}


def prompts_of(experts: Tensor, name: str) -> str:
    """A hash of the rows that an expert is trained on; for `shared`, of all and their experts.

    Args:
        experts: of each training row, (rows,).
    """
    rows = experts if name == "shared" else (experts == int(name)).nonzero()
    return fingerprint({"rows": rows}, {})


def finetuning_step(
    teacher: Teacher,
    student: UNet2DConditionModel,
    recorders: tuple[BlockRecorder, BlockRecorder],
    batch: Noised,
    cfg: Finetuning,
    gates: tuple[GateHandle, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Eq. 30 for one batch: sets the student's gradients, returns the loss and its terms, scalars.

    One micro-batch at a time, each weighted by its share of the batch.

    Args:
        student: an expert, or shared weights with `gates` on them.
        gates: the handle, and the gates of each sample, (B, D).
    """
    B, dtype = len(batch.sample), teacher.dtype
    total = torch.zeros(3)  # the loss and its two terms
    scale = losses.loss_scale(dtype)
    for part in torch.arange(B).split(cfg.micro_batch):
        inputs = batch.part(part)
        with torch.no_grad():
            teacher_output = teacher.unet(**inputs.inputs()).sample
        if gates is not None:  # until after backward, which checkpointing needs
            gates[0].set_gates(gates[1][part].to(teacher.device))
        with torch.autocast(teacher.device.type, dtype, enabled=dtype != torch.float32):
            output = student(**inputs.inputs()).sample
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
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
    return dict(zip(TERMS, total, strict=True))


@dataclass(frozen=True)
class Task:
    """What an expert, or the shared weights, are trained on."""

    cfg: Finetuning
    run: Path
    teacher: Teacher  # in the precision of matrix products
    dense: UNet2DConditionModel  # float32: the teacher's weights, or the run's shared ones
    space: ArchSpace
    codes: Tensor  # binary, (N, D)
    experts: Tensor  # of each training row, (rows,)
    data: Encoded  # the training rows
    empty: Conditions  # of one image, with the empty caption

    def origin(self, name: str) -> dict[str, Any]:
        """What weights depend on beside their code: settings, and a hash of the prompts."""
        return {"settings": made_with(self.cfg), "prompts": prompts_of(self.experts, name)}

    def rows_of(self, i: int) -> Tensor:
        """Rows that an expert is trained on, (R,): its own, or all where it has none."""
        own = (self.experts == i).nonzero().flatten()
        return own if len(own) else torch.arange(len(self.experts))

    def batch(self, rows: Tensor, generator: torch.Generator) -> Noised:
        """Rows, (b,), at random timesteps, some of them with the empty caption."""
        latents, conditions = self.data.batch(rows)
        dropped = torch.rand(len(rows), generator=generator) < self.cfg.caption_dropout  # (b,)
        return add_noise(self.teacher, latents, conditions.drop(dropped, self.empty), generator)


def optimise(
    task: Task,
    student: UNet2DConditionModel,
    rows: Tensor,
    name: str,
    gates: GateHandle | None = None,
) -> None:
    """Train `student` on `rows`, (R,), from its last checkpoint.

    Args:
        name: of the weights, such as `3` or `shared`; its log and checkpoint have it too.
        gates: on the student, to be set to each sample's expert.
    """
    cfg, run, teacher = task.cfg, task.run, task.teacher
    student.requires_grad_(True)
    if cfg.checkpointing:
        student.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr)
    parts: dict[str, Any] = {"expert": student, "optimizer": optimizer}
    same = made_with(cfg) | {"prompts": prompts_of(task.experts, name)}
    checkpoint = Checkpoint(checkpoint_path(run, name), parts, same, cfg.save_minutes)
    first = checkpoint.restore().get("step", 0)
    recorders = (BlockRecorder(teacher.unet), BlockRecorder(student))
    log = MetricsLog(run / "experts" / f"{name}.csv", list(TERMS), first)
    bar = trange(
        first, cfg.steps, initial=first, total=cfg.steps, desc=f"expert {name}", position=rank()
    )

    def make(step: int) -> tuple[Tensor, Noised]:
        pick = rows[batch_rows(len(rows), cfg.batch_size, cfg.seed, step)]  # (b,)
        return pick, task.batch(pick, step_generator(cfg.seed, f"finetune {name}", step))

    prepared = ahead(make, range(first, cfg.steps), teacher.device)
    for step in checkpoint.steps(bar):
        pick, batch = next(prepared)
        optimizer.zero_grad(set_to_none=True)
        own = None if gates is None else (gates, task.codes[task.experts[pick]])
        terms = finetuning_step(teacher, student, recorders, batch, cfg, own)
        values = {term: terms[term].item() for term in TERMS}
        advice = f"expert {name}: try a lower --lr, or --precision fp32 or bf16"
        checkpoint.guard(step, values["loss"], student.parameters(), advice)
        optimizer.step()
        log.write(step, values)
        bar.set_postfix({k: f"{value:.4g}" for k, value in values.items()}, refresh=False)
    log.close()
    for recorder in recorders:
        recorder.detach()


def refitted(task: Task, i: int) -> dict[str, Tensor]:
    """The weights of expert `i` that are solved anew; from its file, or into it."""
    cfg, path = task.cfg, task.run / "experts" / f"{i}.refit.safetensors"
    made = {"code": task.codes[i].int().tolist()} | task.origin(str(i))
    if path.exists():
        tensors, meta = load_tensors(path)
        if meta == made:
            return tensors
    rows, generator = task.rows_of(i), step_generator(cfg.seed, f"refit {i}")
    batch = task.batch(rows[batch_rows(len(rows), cfg.refit_images, cfg.seed, 0)], generator)
    clock = time.time()
    unet = task.dense.to(task.teacher.device)
    tensors, fits = refit(unet, task.space, task.codes[i], batch.inputs(), cfg.ridge)
    left = [fit.layer for fit in fits if not fit.gains]
    print(
        f"expert {i}: {len(tensors)} layers refitted on {cfg.refit_images} images in "
        f"{time.time() - clock:.0f} s"
        + (f"; as they were cut, since they gain nothing: {', '.join(left)}" if left else "")
    )
    save_tensors(path, tensors, made)
    return tensors


def finetune_expert(task: Task, i: int) -> None:
    """Refit expert `i`, train it on its own prompts, and write it to the run.

    Without training its file holds the refitted weights alone; the others are the teacher's.
    """
    cfg, run, code = task.cfg, task.run, task.codes[i]
    path, rows = expert_path(run, i), task.rows_of(i)
    remove_leftovers(path.parent)
    # shared weights were trained through the gates: there is nothing to make up for
    new = refitted(task, i) if cfg.refit and not shared_path(run).exists() else {}
    if cfg.steps:
        expert = cut_expert(task.dense, code, task.space)
        expert.load_state_dict(new, strict=False)
        optimise(task, expert.to(task.teacher.device), rows, str(i))
        new = expert.state_dict()
    meta = {"expert": i, "rows": len(rows)} | task.origin(str(i))
    save_expert(path, new, task.dense.config, code, task.space, meta)
    checkpoint_path(run, str(i)).unlink(missing_ok=True)
    (run / "experts" / f"{i}.refit.safetensors").unlink(missing_ok=True)


def finetune_shared(task: Task) -> None:
    """Train one set of weights through the hard gates of each sample's expert; write it."""
    path = shared_path(task.run)
    remove_leftovers(path.parent)
    student = copy.deepcopy(task.dense).to(task.teacher.device)
    gates = attach_gates(student, task.space)
    optimise(task, student, torch.arange(len(task.experts)), "shared", gates)
    gates.detach()
    meta = {"codes": task.codes.int().tolist()} | task.origin("shared")
    save_tensors(path, student.state_dict(), meta)
    checkpoint_path(task.run, "shared").unlink(missing_ok=True)


def first_and_last(run: Path, name: str) -> tuple[float, float]:
    """Mean distillation loss over the first and the last tenth of the steps, from the log."""
    with (run / "experts" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        values = [float(row["distillation"]) for row in csv.DictReader(file)]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def is_finished(path: Path, cfg: Finetuning, code: Tensor | None, experts: Tensor) -> bool:
    """Whether weights are there.

    Raises `UserError` where they were made with other settings, for another code, (D,), or on other
    prompts than now have the experts, (rows,).
    """
    if not path.exists():
        return False
    header = load_tensors(path)[1]
    if code is not None:
        check_expert(path, header, code)
    refuse_other_settings(path, header["settings"], made_with(cfg))
    prompts = prompts_of(experts, path.stem)
    if header.get("prompts", prompts) != prompts:
        raise UserError(
            f"{path} was trained on other prompts than the run's assignments.json gives it; delete "
            "it and run finetune.py"
        )
    for left in ("checkpoint", "refit"):  # where a kill came just before the end
        path.with_suffix(f".{left}.safetensors").unlink(missing_ok=True)
    return True


def prepare(cfg: Finetuning, run: Path) -> Task:
    """Load what a run's experts are trained on. Raises `UserError`."""
    names = ("summary.json", "config.json", "assignments.json")
    summary, settings, assigned = read_run(run, *names)
    options = {"precision": cfg.precision, "resolution": summary["resolution"]}
    device = start_processes(pick_device(cfg.device))
    teacher = load_run_teacher(run, cfg.teacher, device, **options)
    # experts start from the weights as they are, not as the precision rounds them
    dense = teacher.unet if cfg.precision == "fp32" else load_teacher(teacher.name).unet
    space = find_units(dense, settings["depth"])
    codes = load_codes(run, space)
    data = load_split(run, settings, assigned, "train", teacher.resolution, cfg.data_dir)
    return Task(
        cfg=cfg,
        run=run,
        teacher=teacher,
        dense=load_shared(run, dense, codes) or dense,
        space=space,
        codes=codes,
        experts=torch.tensor(assigned["train"]),
        data=encode_target(teacher, data),
        empty=teacher.empty_conditions().to("cpu"),
    )


def check_use(cfg: Finetuning, run: Path, num_experts: int) -> None:
    """Raises `UserError` for what would change nothing, or would not be used by the sampler."""
    has_shared = shared_path(run).exists()
    if not cfg.steps and (cfg.shared or has_shared or not cfg.refit):
        why = f"{run} has shared weights, which are not refitted" if has_shared else "no refit"
        why = "--shared" if cfg.shared else why
        raise UserError(f"--steps 0 would change nothing ({why}); choose 1 or more")
    own = next((i for i in range(num_experts) if expert_path(run, i).exists()), None)
    if cfg.shared and not has_shared and own is not None:
        raise UserError(
            f"{expert_path(run, own)} would be used instead of shared weights; delete the experts "
            "of this run first, or take another run"
        )


def finetune(cfg: Finetuning) -> None:
    """Fine-tune the experts of a run, or its shared weights, that are not done yet.

    Raises `UserError` for what the user can mend.
    """
    check(cfg)
    run = cfg.run or newest_run()
    summary, assigned = read_run(run, "summary.json", "assignments.json")
    N, experts = summary["num_experts"], torch.tensor(assigned["train"])
    if cfg.expert is not None and not 0 <= cfg.expert < N:
        raise UserError(f"--expert {cfg.expert} is not in {run}; choose one of 0 to {N - 1}")
    if cfg.shared and (world_size() > 1 or cfg.expert is not None):
        raise UserError("--shared trains one set of weights: in one process, without --expert")
    wanted, codes = [cfg.expert] if cfg.expert is not None else list(range(N)), load_codes(run)
    check_use(cfg, run, N)
    if cfg.shared:
        todo = [] if is_finished(shared_path(run), cfg, None, experts) else [-1]
    else:
        todo = [i for i in wanted if not is_finished(expert_path(run, i), cfg, codes[i], experts)]
    if not todo:
        print(f"{run}: all that was asked for is fine-tuned already")
        return
    task = prepare(cfg, run)
    check_agreement(hash(tuple(todo)) % 2**48, "which experts are done")
    leave_processes()  # from here on nothing is shared, and none waits for another
    if cfg.shared:
        finetune_shared(task)
        return
    mine = todo[rank() :: world_size()]
    if not mine:
        print(f"process {rank()} has no expert: {len(todo)} for {world_size()} processes")
    for i in mine:
        clock = time.time()
        finetune_expert(task, i)
        learned = ""
        if cfg.steps:
            before, after = first_and_last(run, str(i))
            learned = f", distillation loss {before:.4f} -> {after:.4f}"
        print(
            f"expert {i}: {int((task.experts == i).sum())} prompts, {cfg.steps} steps in "
            f"{time.time() - clock:.0f} s{learned}, {expert_path(run, i)}"
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

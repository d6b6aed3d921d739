"""A run: what a pruning method is given, and the folder that it leaves. Sec. 3.4, Eq. 22, App. E.

`prepare` loads a `Setup`: teacher, architecture space, costs, data set, prompt embeddings. Every
method ends in `write_results`, so that fine-tuning, sampling and evaluation read one kind of
folder:

| file | what |
|---|---|
| `config.json` | the settings; written first |
| `latency.json` | the table of latency that the cost is read off, if it is latency |
| `metrics.csv` | the terms of the loss, a row a step |
| `router.safetensors` | the router, and its prompt encoder's name |
| `codes.safetensors` | binary codes that meet the budget, (N, D) |
| `assignments.json` | the expert of each prompt at test time, and a hash of each split's rows |
| `summary.json` | what was made; written last |
| `experts/<i>.safetensors` | experts that are refitted, fine-tuned |
| `experts/shared.safetensors` | one set of weights that all experts are cut out of |
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from common.checkpoint import refuse_other_settings
from common.errors import UserError
from common.files import load_tensors, read_json, remove_leftovers, save_tensors, write_json
from common.processes import (
    check_agreement,
    from_first,
    local_rows,
    pick_device,
    start_processes,
)
from evaluation.analysis import frequent_words
from gates import ArchSpace
from latency import (
    Place,
    device_name,
    latency_model,
    measure_table,
    meet_in_time,
    read_table,
    time_experts,
)
from macs import CostModel, check_budget, measure_macs, meet_budget
from prune_unet import cut_in_place, find_units, meta_copy
from router import PromptEncoder, PromptRouter, content_map
from settings import MACHINE, RUNS, Pruning
from targets.emoji import EMOJI_SIZE
from targets.images import TARGETS, CaptionedImages, check_images, load_target
from teacher.encoded import Encoded, encode_target
from teacher.model import Noised, Teacher, add_noise, load_teacher

PAPER_PIXELS = 256  # while pruning
LATENCY = "latency.json"
WORDINGS_OF = 300  # images whose captions `content_map` compares
NEEDED = {  # what scripts read of a run, by its file
    "summary.json": (
        *("target", "teacher", "resolution", "macs_resolution", "budget", "num_experts"),
        *("experts", "macs_dense", "macs_ratio_mean", "usage_train", "usage_validation"),
    ),
    "config.json": ("target", "data_dir", "limit", "seed", "depth"),
    "assignments.json": ("train", "validation"),
}


# ---- what a method is given ----


@dataclass(frozen=True)
class Setup:
    """What a pruning method is given."""

    cfg: Pruning
    teacher: Teacher
    space: ArchSpace
    macs: CostModel  # at the teacher's own resolution, where experts will be used
    cost: CostModel  # what the budget is of: `macs`, or the latency of `table`
    table: dict[str, Any] | None
    data: CaptionedImages
    validation: CaptionedImages
    encoder: PromptEncoder
    z: Tensor  # embeddings of the training prompts, (rows, dz)
    content: Tensor  # C, the map of `content_map`, (dz, dz)
    encoded: Encoded  # the training rows as the U-Net reads them
    seconds: float  # spent on encoding
    identities: dict[str, str] = field(default_factory=dict)  # split -> a hash of what its rows are

    def start_router(self) -> PromptRouter:
        """An untrained router on the teacher's device."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        router = PromptRouter(
            self.z.shape[1],
            self.space.size,
            cfg.num_experts,
            center=cfg.center,
            own_keys=cfg.own_keys,
            open_logit=cfg.open_logit,
        )
        if cfg.center:
            router.mean_z.copy_(self.z.mean(0))
        router.content.copy_(self.content)
        return router.to(self.teacher.device)

    def noised(
        self, rows: Tensor, generator: torch.Generator, local: Tensor | None = None
    ) -> Noised:
        """Training rows at random timesteps.

        Args:
            rows: row numbers, (b,).
            local: which rows of a batch of `batch_size` these are, (b,); if absent, they are a
                whole batch.
        """
        B = len(rows) if local is None else self.cfg.batch_size
        return add_noise(self.teacher, *self.encoded.batch(rows), generator, local, B)


def load_splits(cfg: Pruning, pixels: int) -> dict[str, CaptionedImages]:
    """Both splits of the target. Raises `UserError`."""
    where: dict[str, Any] = {"data_dir": cfg.data_dir, "seed": cfg.seed, "resolution": pixels}
    return {
        split: load_target(cfg.target, split, limit=limit, **where)
        for split, limit in (("train", cfg.limit), ("validation", None))
    }


def prepare(cfg: Pruning, scored: bool = False) -> Setup:
    """Load the teacher and the data set, and encode the training rows.

    Args:
        scored: whether images of both splits will be scored, for which some targets are too small.

    Raises:
        UserError: something is missing, too small, or does not fit.
    """
    local_rows(cfg.batch_size)  # too many processes are refused before anything is loaded
    device = start_processes(pick_device(cfg.device))
    table = given_table(cfg)
    pixels = cfg.resolution or (EMOJI_SIZE if cfg.target == "emoji" else PAPER_PIXELS)
    splits = load_splits(cfg, pixels)  # data first, since what is missing there is found at once
    if len(splits["train"]) < cfg.num_experts:
        raise UserError(
            f"--target {cfg.target} has {len(splits['train'])} training prompts, fewer than the "
            f"{cfg.num_experts} experts; lower --num-experts or add images"
        )
    for split, rows in splits.items() if scored else ():
        check_images(rows, split)
    identities = {split: rows.identity(states=False) for split, rows in splits.items()}
    number = int(identities["train"][:12], 16)
    check_agreement(number, "the hash of their training rows")
    teacher = load_teacher(cfg.teacher, device, precision=cfg.precision, resolution=cfg.resolution)
    if cfg.resolution is None:
        teacher = replace(teacher, pixels=min(PAPER_PIXELS, teacher.resolution))
    if teacher.resolution != pixels:
        splits = load_splits(cfg, teacher.resolution)
    data = splits["train"].note_enlarged(teacher.resolution)
    if long := teacher.cut_off(data.captions):
        data.notes[f"cut off at {teacher.text_tokens} tokens"] = long
    if cfg.checkpointing:
        teacher.unet.enable_gradient_checkpointing()
    space = find_units(teacher.unet, cfg.depth)
    macs, cost, table = costs_of(cfg, teacher, space, table)
    clock = time.time()
    encoder = PromptEncoder(cfg.prompt_encoder, teacher.device)
    z = encoder.embeddings(data.captions)  # (rows, dz)
    content = torch.eye(z.shape[1])
    if cfg.by_content:
        wordings, images = data.wordings(WORDINGS_OF)
        content = content_map(encoder.embeddings(wordings), images)
    encoded = encode_target(teacher, data)
    return Setup(
        cfg=cfg,
        teacher=teacher,
        space=space,
        macs=macs,
        cost=cost,
        table=table,
        data=data,
        validation=splits["validation"],
        encoder=encoder,
        z=z,
        content=content,
        encoded=encoded,
        seconds=time.time() - clock,
        identities=identities,
    )


# ---- the cost in seconds ----


def given_table(cfg: Pruning) -> dict[str, Any] | None:
    """The table of latency that `--cost` names, or that the run began with; else None.

    Raises `UserError` where that is no table, or the run began on another device.
    """
    if cfg.cost == "macs":
        return None
    mine = (cfg.out or RUNS) / LATENCY
    if cfg.cost != "latency":
        return read_table(cfg.cost)
    if not mine.exists():
        return None
    table, here = read_table(str(mine)), device_name(str(pick_device(cfg.device)))
    if (there := table["machine"]["device"]) != here:
        raise UserError(
            f"{mine} was measured on {there}, but experts would be timed on {here}; go on there, "
            f"or start another run for that device with --cost {mine} and another --out"
        )
    return table


def used_at(teacher: Teacher) -> Teacher:
    """The teacher at its own resolution, at which experts will be used."""
    return replace(teacher, pixels=teacher.own_pixels or teacher.resolution)


def deployment(teacher: Teacher, precision: str) -> Place:
    """Where experts will be used: on this device, two images at once, as guidance has it."""
    at, here = used_at(teacher), (str(teacher.device), precision)
    return Place(*here, 2, at.resolution, at.latent_size, teacher.text_tokens)


def costs_of(
    cfg: Pruning, teacher: Teacher, space: ArchSpace, table: dict[str, Any] | None
) -> tuple[CostModel, CostModel, dict[str, Any] | None]:
    """T(a) in MACs, T(a) that the budget is of, and the table that this is read off, if any.

    Both are where experts will be used, at the teacher's own resolution. Latency is measured here
    if it is asked for and there is no table yet, with two images at once, as guidance has it.
    Raises `UserError` where the budget cannot be reached.
    """
    sizes = {"latent_size": used_at(teacher).latent_size, "text_tokens": teacher.text_tokens}
    macs = measure_macs(teacher.unet, space, **sizes)
    if cfg.cost == "latency" and table is None:
        place = deployment(teacher, cfg.precision)
        table = from_first(lambda: measure_table(teacher.unet, place))
    cost = latency_model(teacher.unet, space, table) if table else macs
    check_budget(cfg.budget, cost)
    return macs, cost, table


# ---- the folder ----


def start_folder(setup: Setup, settings: dict[str, Any]) -> None:
    """Write what a resumed run must find as it was: the settings, and the table of latency."""
    assert setup.cfg.out
    write_json(setup.cfg.out / "config.json", settings)
    if setup.table:
        write_json(setup.cfg.out / LATENCY, setup.table)


def newest_run(root: Path = RUNS) -> Path:
    """The complete run that was finished last. Raises `UserError` where there is none."""
    runs = sorted(root.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(
            f"there is no finished run under {root.resolve()}; run `python train.py` first, or "
            f"name one with --run"
        )
    return runs[-1].parent


def as_json(cfg: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values."""
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in asdict(cfg).items()
    }


def check_resumable(run: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds another run; settings of the machine may differ.

    Raises:
        UserError: the folder holds a run with other settings, or files that are no run.
    """
    remove_leftovers(run, "config.json")
    if (run / "config.json").exists():
        old = read_json(run / "config.json")
        refuse_other_settings(run, old, {k: v for k, v in settings.items() if k not in MACHINE})
        remove_leftovers(run)
    elif run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; choose another folder with --out")


def read_run(run: Path, *names: str) -> list[dict[str, Any]]:
    """Some of a run's JSON files, by name: those of `NEEDED`.

    Raises:
        UserError: there is no run, or a file is missing, is not JSON, or lacks a field.
    """
    if not run.is_dir():
        raise UserError(f"--run {run} does not exist; `python train.py` makes one")
    found = []
    for name in names:
        content = read_json(run / name)
        fields = content if isinstance(content, dict) else {}
        lacking = [field for field in NEEDED[name] if field not in fields]
        if lacking:
            raise UserError(
                f"{run / name} lacks {', '.join(lacking)}: it is not what a finished run holds; "
                f"make the run again, or name another with --run"
            )
        found.append(fields)
    return found


def expert_path(run: Path, expert: int) -> Path:
    """Where a run keeps a fine-tuned expert."""
    return run / "experts" / f"{expert}.safetensors"


def check_expert(path: Path, header: dict[str, Any], code: Tensor) -> None:
    """Raises `UserError` where an expert's file was not cut by the run's own code, (D,)."""
    if header.get("code") != code.int().tolist():
        raise UserError(
            f"{path} is not an expert of this run: its code is another one than the run's "
            f"codes.safetensors has; delete it and run finetune.py"
        )


def shared_path(run: Path) -> Path:
    """Where a run keeps the weights that all of its experts share."""
    return run / "experts" / "shared.safetensors"


def load_shared(
    run: Path, unet: UNet2DConditionModel, codes: Tensor
) -> UNet2DConditionModel | None:
    """The run's shared weights as a dense U-Net in float32, on the CPU; None where it has none.

    Raises `UserError` where they were trained for other codes.

    Args:
        unet: the teacher's, for its configuration.
        codes: the run's, (N, D).
    """
    path = shared_path(run)
    if not path.exists():
        return None
    tensors, header = load_tensors(path)
    if header.get("codes") != codes.int().tolist():
        raise UserError(
            f"{path} was trained for other experts than the run's; delete it and run finetune.py "
            "--shared again"
        )
    shared = meta_copy(unet)
    shared.load_state_dict(tensors, assign=True)
    return shared


def load_codes(run: Path, space: ArchSpace | None = None) -> Tensor:
    """The run's binary codes, (N, D). Raises `UserError` where they are not for `space`."""
    tensors, _ = load_tensors(run / "codes.safetensors")
    codes = tensors["codes"].float()
    if space is not None and codes.shape[1] != space.size:
        raise UserError(
            f"{run} has codes of {codes.shape[1]} units but its teacher has {space.size}: the run "
            f"is from another teacher"
        )
    return codes


def load_router(run: Path, device: torch.device) -> tuple[PromptRouter, str]:
    """The run's router in eval mode, and the name of its prompt encoder. Raises `UserError`."""
    path = run / "router.safetensors"
    tensors, settings = load_tensors(path)
    encoder = settings.pop("prompt_encoder", "")
    try:
        router = PromptRouter(**settings)
        router.load_state_dict(tensors)
    except (RuntimeError, TypeError):
        raise UserError(
            f"{path} is of another version of this program; prune again with train.py"
        ) from None
    return router.to(device).eval(), encoder


@contextmanager
def named_by(file: Path, flag: str, now: object, words: str = "") -> Iterator[None]:
    """For what a run's file names: a `UserError` says so, and which flag names another place.

    Args:
        now: what was given after the flag; if anything, errors are left as they are.
        words: those that an error has if it is about what is named.
    """
    try:
        yield
    except UserError as error:
        if now is not None or words not in str(error):
            raise
        raise UserError(f"{error} ({file} names it; {flag} says where it is now)") from None


def load_run_teacher(run: Path, now: str | None, device: torch.device, **options: Any) -> Teacher:
    """The teacher of a run, or where it is now.

    Raises `UserError` where it cannot be loaded (see `load_teacher`), or is another one by now.
    """
    path = run / "summary.json"
    summary = read_json(path)
    with named_by(path, "--teacher", now, "--teacher"):
        teacher = load_teacher(now or summary["teacher"], device, **options)
    if summary.get("teacher_hash", teacher.identity) != teacher.identity:
        raise UserError(
            f"{teacher.name} is not the teacher of {run} any more: its U-Net's weights or its "
            f"noise schedule have changed; give them back as they were, name a copy with "
            f"--teacher, or prune again with train.py"
        )
    return teacher


def load_split(
    run: Path,
    settings: dict[str, Any],
    assigned: dict[str, Any],
    split: str,
    resolution: int,
    data_dir: Path | None = None,
) -> CaptionedImages:
    """A split of a run's target. Raises `UserError` where its rows have changed since the run.

    Args:
        settings: the run's config.json.
        assigned: the run's assignments.json; without a hash, numbers of rows alone are compared.
        resolution: pixels a side.
        data_dir: where the target's files are now, if they were moved.
    """
    target, folder = settings["target"], data_dir or settings["data_dir"]
    if data_dir is not None and target not in TARGETS:
        target = str(data_dir)
    with named_by(run / "config.json", "--data-dir", data_dir):
        data = load_target(
            target,
            split,
            seed=settings["seed"],
            limit=settings["limit"] if split == "train" else None,
            data_dir=folder and Path(folder),
            resolution=resolution,
        )
    if len(data) != len(assigned[split]):
        raise UserError(
            f"{data.report()}; the run's assignments have {len(assigned[split]):,} rows of "
            f"{split}: give its images back as they were, or prune again with train.py"
        )
    identity = data.identity(states=False)
    if assigned.get("data", {}).get(split, identity) != identity:
        raise UserError(
            f"the {len(data):,} rows of {split} of target {target} are not those of "
            f"the run: a caption, an image's name or their order has changed; give them back as "
            f"they were, or prune again with train.py"
        )
    return data


def write_results(
    setup: Setup,
    router: PromptRouter,
    seconds: dict[str, float],
    *,
    scores: Tensor | None = None,
    method: str = "aptp",
    given: dict[str, Tensor] | None = None,
) -> None:
    """Route every prompt as at test time, meet the budget, and write the results, a summary last.

    Args:
        setup: what the method was given.
        router: trained; for a method with one expert, any router.
        seconds: time of each stage.
        scores: of another method's units, (N, D) or (1, D); if absent, the router's codes.
        method: its name.
        given: for a control, the expert of each row by split, whatever the router says.
    """
    cfg = setup.cfg
    assert cfg.out
    run, macs, z_validation = cfg.out, setup.macs, setup.encoder(setup.validation.captions)
    routed = given or {
        split: torch.cat([router.route(part).cpu() for part in z.split(8192)])
        for split, z in (("train", setup.z), ("validation", z_validation))
    }
    usage = {
        split: torch.bincount(experts, minlength=cfg.num_experts) / len(experts)
        for split, experts in routed.items()
    }
    own = router.codes if scores is None else scores
    codes, latency, latencies = final_codes(setup, own, usage["train"])
    save_tensors(
        run / "router.safetensors",
        router.state_dict(),
        {**router.settings(), "prompt_encoder": setup.encoder.name},
    )
    save_tensors(run / "codes.safetensors", {"codes": codes.to(torch.uint8)}, {"depth": cfg.depth})
    assigned = {split: experts.tolist() for split, experts in routed.items()}
    write_json(run / "assignments.json", assigned | {"data": setup.identities})
    summary = {
        "method": method,
        "target": cfg.target,
        "teacher": setup.teacher.name,
        "teacher_hash": setup.teacher.identity,
        "resolution": setup.teacher.resolution,
        "macs_resolution": setup.teacher.own_pixels or setup.teacher.resolution,
        "budget": cfg.budget,
        "num_experts": cfg.num_experts,
        "units": macs.space.size,
        "macs_dense": round(macs.dense),
        "macs_ratio_mean": (usage["train"].double() @ macs(codes)).item() / macs.dense,
        "usage_train": usage["train"].tolist(),
        "usage_validation": usage["validation"].tolist(),
        "experts": list(describe_experts(setup, codes, routed["train"], latencies)),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        **latency,
    }
    write_json(run / "summary.json", summary)


def measured_ratio(setup: Setup) -> dict[str, float]:
    """The mean latency of a finished run's experts, over its training prompts, timed here.

    As `latency_ratio`, a share of the dense U-Net's; nothing where it cannot be timed.
    """
    cfg, teacher = setup.cfg, setup.teacher
    assert cfg.out
    if teacher.device.type not in ("cpu", "cuda"):
        return {}
    codes, (summary,) = load_codes(cfg.out, setup.space), read_run(cfg.out, "summary.json")
    place, shares = deployment(teacher, cfg.precision), torch.tensor(summary["usage_train"])
    seconds = time_experts(teacher.unet, codes, setup.cost, place)  # (N,)
    return {"latency_ratio": (shares.double() @ seconds).item() / setup.cost.dense}


def final_codes(
    setup: Setup, scores: Tensor, shares: Tensor
) -> tuple[Tensor, dict[str, Any], list[dict[str, Any]]]:
    """Binary codes, (N, D), and what a budget of time adds to a run's summary and its experts.

    Args:
        scores: of units, of which the lowest are closed, (N, D); (1, D) where experts share a code.
        shares: of the prompts, (N,).
    """
    budget, again = setup.cfg.budget, len(shares) // len(scores)
    if len(scores) == 1:
        shares = shares.sum(0, keepdim=True)
    if setup.table is None:
        codes, summary = meet_budget(scores, shares, setup.cost, budget), dict[str, Any]()
        experts: list[dict[str, Any]] = [{}] * len(codes)
    else:
        codes, summary, experts = meet_in_time(
            setup.teacher.unet,
            setup.cost,
            setup.table,
            device=str(setup.teacher.device),
            budget=budget,
            logits=scores,
            shares=shares,
        )
    return codes.repeat(again, 1), summary, experts * again


def describe_experts(
    setup: Setup, codes: Tensor, routed: Tensor, latencies: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What `summary.json` says of each expert.

    Args:
        codes: binary codes, (N, D).
        routed: expert of each training prompt, (rows,).
        latencies: of each expert, as `final_codes` gives them.
    """
    everything = setup.data.captions
    for i, code in enumerate(codes):
        rows = (routed == i).nonzero().flatten().tolist()
        cut = meta_copy(setup.teacher.unet)  # shapes are enough to count parameters
        cut_in_place(cut, setup.space, code)
        yield {
            "id": i,
            "macs_ratio": setup.macs(code).item() / setup.macs.dense,
            "params": sum(p.numel() for p in cut.parameters()),
            "usage_train": len(rows) / len(routed),
            "words": frequent_words([everything[row] for row in rows], everything),
            **latencies[i],
        }

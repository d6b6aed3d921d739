"""Scores a run, and compares methods: Sec. 4, App. E.3-E.4.

    python evaluate.py                         # the newest run: metrics.json, figures, report.html
    python evaluate.py --methods aptp,norm,sp,bksdm,random,uni-arch,dense --seeds 3

A run is scored on captions of both splits: the router sends each to its expert, every image has a
seed of its own, and the unpruned teacher gets the same captions and seeds. The comparison makes an
ordinary run folder for each method, seed and number of fine-tuning steps, and writes the tables.
Both can be killed at any moment and continue with the same command.

Departures from the paper:
- Where the paper's extractors are not available, distances are taken in the features of an
  EfficientNet-Lite0 that comes with a package; `--metrics paper` asks for the published ones.
- Latency is measured on this machine, while the scored images are generated.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import baselines
import finetune
import train
from common.errors import UserError, command_line
from common.files import replacing, write_json
from common.options import read_options
from common.randomness import batch_rows, step_generator
from common.ranges import check_ranges
from common.runs import RUNS, as_json, claim, newest_run, read_run
from evaluation import metrics
from evaluation.analysis import Routed
from evaluation.features import load_extractor
from evaluation.generated import (
    GeneratedImages,
    Sampling,
    examples,
    generate,
    through_each_expert,
)
from evaluation.report import Inputs, write_report
from evaluation.scores import SUITES, Reconstructed, Subset, in_common
from evaluation.tables import aggregate, markdown, write_tables
from finetune import load_codes
from macs import retained
from problem import load_split, prepare, write_results
from sample import APTPPipeline, read_prompts
from settings import FREE, Finetuning, Pruning, resolve, resolve_finetuning
from targets.images import spread

SHOWN = ("a giraffe", "a slice of pizza")  # through every expert

APTP: dict[str, dict[str, Any]] = {  # and the rows of Table 3
    "aptp": {},
    "contrastive": {"transport": False, "distill": False},
    "transport": {"distill": False},
}
METHODS = (*APTP, *baselines.METHODS)
PROTOCOLS = {"expert": ("expert",), "all": ("all",), "both": ("expert", "all")}
SHARED = (  # settings of the comparison that are those of train.py
    *("target", "teacher", "budget", "num_experts", "data_dir", "limit"),
    *("warmup_steps", "joint_steps", "device"),
)


@dataclass(frozen=True)
class Config:
    """Scoring one run, or, with `--methods`, comparing several methods."""

    HEADINGS: ClassVar = {"run": "scoring a run", "methods": "comparing methods"}
    run: Path | None = None
    """Run folder to score; the newest run if not given."""
    images: int = 250
    """Of each split (paper: 30,000 for COCO, 14,000 for CC3M)."""
    metrics: str = "embedded"
    """embedded: EfficientNet-Lite0; paper: FID, CLIP score, CMMD."""
    steps: int = 25
    """Denoising steps (paper: 25)."""
    guidance: float | None = None
    """Classifier-free guidance; the teacher's own (paper: 7.5)."""
    seed: int = 0
    """Seed that each image's own follows from."""
    batch_size: int = 50
    """Images generated at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dense: bool = True
    """Score the unpruned teacher on the same captions too."""
    prompts_file: Path | None = None
    """With --metrics paper: PickScore of these (Table 6)."""
    without_transport: Path | None = None
    """A run of train.py --no-transport to show beside (Figs. 8, 9)."""
    methods: str | None = None
    """With commas between, such as aptp,norm,sp,uni-arch,dense."""
    seeds: int = 1
    """Runs of each method, seeds 0, 1, ..."""
    target: str = "emoji"
    """Captioned images to prune on."""
    teacher: str | None = None
    """The model to prune; by target if not given."""
    budget: float = 0.78
    """Share of the teacher's MACs."""
    num_experts: int = 8
    """Experts of APTP and its ablations."""
    data_dir: Path | None = None
    """Folder of the target's files, for coco and cc3m."""
    limit: int | None = None
    """Use only this many training prompts, for a quick trial."""
    warmup_steps: int | None = None
    """Of train.py; by target if not given."""
    joint_steps: int | None = None
    """Of train.py; by target if not given."""
    finetune_steps: int | None = None
    """Of each of APTP's experts; by target if not given."""
    protocol: str = "all"
    """One expert's steps: as one of APTP's (expert: paper), all, both."""
    out: Path | None = None
    """Folder; runs/compare-<target>-<budget> if not given."""

    def sampling(self) -> Sampling:
        return Sampling(self.steps, self.guidance, self.seed, self.batch_size)


# ---- the scores of a run ----


def check(cfg: Config) -> None:
    """Raises `UserError` for settings that cannot work."""
    check_ranges(cfg)
    for name, value, known in (
        ("metrics", cfg.metrics, SUITES),
        ("protocol", cfg.protocol, PROTOCOLS),
    ):
        if value not in known:
            raise UserError(f"--{name} {value} is unknown; choose one of: {', '.join(known)}")
    if cfg.prompts_file and cfg.metrics != "paper":
        raise UserError(
            f"--prompts-file {cfg.prompts_file} is for PickScore; add --metrics paper, or leave it"
        )


def score(cfg: Config, run: Path) -> dict[str, Any]:
    """Generate and score images of a run's captions, and write its report.

    Returns what <run>/report/metrics.json then holds. Raises `UserError`.
    """
    check(cfg)
    pipeline, sampling = APTPPipeline.from_pretrained(run, cfg.device), cfg.sampling()
    names = ("summary.json", "config.json", "assignments.json")
    summary, settings, assigned = read_run(run, *names)
    codes, macs = load_codes(run, pipeline.space), pipeline.macs()
    suite = SUITES[cfg.metrics](pipeline.teacher.device)
    method, experts = summary.get("method", "aptp"), summary["experts"]
    found: list[dict[str, Any]] = []
    common, routed, samples = [], {}, []
    for split in ("train", "validation"):
        data = load_split(settings, assigned, split, pipeline.teacher.resolution)
        rows = spread(len(data), cfg.images)
        real = Subset(data, rows)
        chosen = torch.tensor(assigned[split])
        distances = baselines.output_distances(pipeline.teacher, data, codes, chosen, macs)
        made = generated(pipeline, method, data.captions, split, rows, cfg)
        for name, images in made.items():
            who = {"method": name, "split": split} | images.costs(pipeline.ratios)
            found.append(who | suite(images, real) | (distances if name == method else {}))
        if cfg.dense:
            ceiling = suite(Reconstructed(pipeline.teacher, real), real)
            found.append({"method": "autoencoder", "split": split, "images": len(rows)} | ceiling)
        routed[split] = Routed(data.captions, data.groups, assigned[split])
        if len(experts) > 1:
            common += in_common(data, assigned[split], split)
        if split == "validation":
            ratios = pipeline.ratios
            samples = examples(data.captions, made[method], made.get("dense"), ratios)
    if cfg.prompts_file:
        found += free_prompts(pipeline, method, cfg)
    metrics_json = {"rows": found, "nmi": common, "settings": as_json(cfg)}
    blocks, kept = retained(codes, macs)
    inputs = Inputs(
        summary,
        routed["train"],
        routed["validation"],
        (macs(codes) / macs.dense).tolist(),
        macs.dense,
        blocks,
        kept.numpy(),
        metrics=metrics_json,
        samples=samples,
        without_transport=cfg.without_transport,
    )
    if len(experts) > 1:
        style = ", flat emoji" if summary["target"] == "emoji" else ""
        shown = [thing + style for thing in SHOWN]
        inputs = replace(
            inputs,
            batch=last_batch(pipeline, settings, routed["train"].captions),
            same_prompt=through_each_expert(pipeline, shown, sampling, pipeline.ratios),
        )
    page = write_report(run, inputs)
    write_json(run / "report" / "metrics.json", metrics_json)  # last: the run is scored
    print(f"wrote {page}")
    return metrics_json


def generated(
    pipeline: APTPPipeline,
    method: str,
    captions: Sequence[str],
    split: str,
    rows: list[int],
    cfg: Config,
) -> dict[str, GeneratedImages]:
    """Images of some captions by a run's experts and, unless switched off, by its teacher."""
    base, sampling = pipeline.run / "report" / "images", cfg.sampling()
    made = {method: generate(pipeline, base, captions, split, rows, sampling, None)}
    if cfg.dense and method != "dense":
        made["dense"] = generate(pipeline, base, captions, split, rows, sampling, -1)
    return made


def free_prompts(pipeline: APTPPipeline, method: str, cfg: Config) -> list[dict[str, Any]]:
    """PickScores of the prompts of a file, such as PartiPrompts' (Table 6)."""
    assert cfg.prompts_file
    extractor = load_extractor("pickscore", pipeline.teacher.device)
    prompts = read_prompts(cfg.prompts_file)
    made = generated(pipeline, method, prompts, "prompts", list(range(len(prompts))), cfg)
    return [
        {"method": name, "split": "prompts"}
        | images.costs(pipeline.ratios)
        | {"pick_score": metrics.pick_score(images, prompts, extractor)}
        for name, images in made.items()
    ]


@torch.no_grad()
def last_batch(
    pipeline: APTPPipeline, settings: dict[str, Any], captions: Sequence[str]
) -> tuple[list[int], list[int]]:
    """The last training batch of a run: its rows, (B,), and their experts by transport (Eq. 20).

    Args:
        settings: the run's config.json; older ones have no `transport_rows`.
        captions: of all training rows.
    """
    step, seed = settings["warmup_steps"] + settings["joint_steps"] - 1, settings["seed"]
    rows = batch_rows(len(captions), settings["batch_size"], seed, step).tolist()
    others = torch.randperm(len(captions), generator=step_generator(seed, "train", step)).tolist()
    others = others[: max(0, settings.get("transport_rows", 0) - len(rows))]  # as `train.optimise`
    e = pipeline.router(pipeline.encoder([captions[row] for row in rows + others]))  # (B + P, D)
    eps, iterations = settings["eps"], settings["sinkhorn_iterations"]
    experts = pipeline.router.transport_assignment(e, eps, iterations)[: len(rows)]
    return rows, experts.tolist()


# ---- the comparison of methods ----


def parse_methods(text: str) -> list[str]:
    """Methods named with commas between. Raises `UserError` for one that does not exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in METHODS), None)
    if unknown or not names:
        what = f"{unknown} is unknown" if unknown else "names none"
        raise UserError(f"--methods {what}; choose among: {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def prune(method: str, cfg: Pruning) -> None:
    """Make the run folder `cfg.out` of a method, unless it is there. Raises `UserError`."""
    if method in APTP:
        train.train(replace(cfg, **APTP[method]))
        return
    depth = baselines.DEPTHS.get(method, cfg.depth)
    num_experts = cfg.num_experts if method in baselines.ROUTED else 1
    cfg = resolve(replace(cfg, num_experts=num_experts, depth=depth))
    assert cfg.out
    settings = as_json(cfg) | {"method": method}
    claim(cfg.out, settings, free=FREE)
    if (cfg.out / "summary.json").exists():
        return
    problem = prepare(cfg)
    write_json(cfg.out / "config.json", settings)
    router = problem.start_router()
    codes = baselines.METHODS[method](problem, router)  # (N, D)
    write_results(cfg, problem, router, {}, codes=codes, method=method)


def finetuned(run: Path, method: str, steps: int, cfg: Finetuning) -> Path:
    """A copy of a pruned run whose experts are fine-tuned for `steps` steps each."""
    folder = run.with_name(f"{run.name}@{steps}")
    if not (folder / "summary.json").exists():
        files = [path for path in run.iterdir() if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "summary.json"):
            with replacing(folder / path.name) as temporary:  # the summary last: it is complete
                shutil.copyfile(path, temporary)
    if method != "dense":
        finetune.finetune(replace(cfg, run=folder, steps=steps))
    return folder


def compare(cfg: Config) -> Path:
    """Make and score every cell of a comparison that is missing; write the tables after each.

    Returns the comparison's folder. Raises `UserError`.
    """
    methods = parse_methods(cfg.methods or "")
    folder = cfg.out or RUNS / f"compare-{cfg.target}-{cfg.budget:g}"
    pruning = Pruning(**{name: getattr(cfg, name) for name in SHARED})
    tuning = Finetuning(device=cfg.device)
    steps = cfg.finetune_steps or resolve_finetuning(tuning, cfg.target).steps
    assert steps
    cells = [(method, seed) for seed in range(cfg.seeds) for method in methods]
    for number, (method, seed) in enumerate(cells, start=1):
        print(f"--- cell {number} of {len(cells)}: {method}, seed {seed}", flush=True)
        run = folder / f"{method}-{seed}"
        prune(method, replace(pruning, seed=seed, out=run))
        experts = read_run(run, "summary.json")[0]["num_experts"]
        lengths = {"expert": steps, "all": steps * cfg.num_experts // experts}
        for own in {lengths[name] for name in PROTOCOLS[cfg.protocol]}:
            done = finetuned(run, method, own, replace(tuning, seed=seed))
            if not (done / "report" / "metrics.json").exists():
                score(replace(cfg, dense=False), done)
            write_tables(folder, METHODS)
    return folder


# ---- command line ----


def evaluate(cfg: Config) -> None:
    """Score a run, or, with `methods`, compare several; prints what was found."""
    check(cfg)
    if cfg.methods is None:
        found = score(cfg, cfg.run or newest_run())
        print(markdown("Scores", aggregate(found["rows"])))
    else:
        print((compare(cfg) / "tables.md").read_text(encoding="utf-8"))


def main() -> None:
    evaluate(read_options(Config, __doc__))


if __name__ == "__main__":
    command_line(main)

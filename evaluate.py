"""Scores a run, and compares methods: Sec. 4, App. E.3-E.4.

    python evaluate.py                         # the newest run: metrics.json, figures, report.html
    python evaluate.py --run runs/emoji-0.78 --images 500
    python evaluate.py --methods aptp,norm,sp,bksdm,random,uni-arch,dense --seeds 3

A run is scored on captions of both splits: the router sends each to its expert, every picture has a
seed of its own, and the same captions and seeds go through the unpruned teacher. The comparison
makes one ordinary run folder a method and seed, all at the same budget, fine-tuned for as many
steps in all, and writes the tables. Either can be killed at any moment and goes on with the same
command: a picture that was drawn, a cell that was scored, is not made again.

Departures from the paper:
- Where the paper's extractors cannot be had, distances are taken in the features of an
  EfficientNet-Lite0 that comes with a package; `--metrics paper` asks for the published ones.
- Latency is measured on this machine, over the drawing of the scored pictures.
"""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

import baselines
import finetune
import train
from common.errors import UserError, command_line
from common.files import read_json, replacing, write_json
from common.runs import RUNS, as_json, claim, newest_run
from evaluation import metrics
from evaluation.analysis import Routed
from evaluation.features import load_extractor
from evaluation.figures import Sample
from evaluation.generated import Drawn, draw
from evaluation.report import Inputs, write_report
from evaluation.scores import SUITES, Reconstructed, Subset, in_common, readable
from evaluation.tables import aggregate, as_numbers, markdown
from finetune import load_codes
from macs import measure_macs
from problem import load_split, prepare, write_results
from router import PromptRouter
from sample import APTPPipeline, read_prompts
from settings import FREE, Finetuning, Pruning, by_target, resolve
from targets.images import CaptionedImages, spread

SPLITS = ("train", "validation")

SHOWN = ("a giraffe", "a slice of pizza")  # through every expert


@dataclass(frozen=True)
class Config:
    """Scoring one run, or, with `--methods`, comparing several methods."""

    run: Path | None = None
    """Run folder to score; the newest run if not given."""
    images: int = 250
    """Pictures drawn of each split's captions (paper: 30,000 for COCO, 14,000 for CC3M)."""
    steps: int = 25
    """Denoising steps (paper: 25)."""
    guidance: float | None = None
    """Classifier-free guidance; the teacher's own if not given (paper: 7.5)."""
    seed: int = 0
    """Seed of the drawings; each has one of its own."""
    batch_size: int = 50
    """Pictures drawn at once."""
    metrics: str = "embedded"
    """embedded: distances in EfficientNet-Lite0's features; paper: FID, CLIP score, CMMD."""
    prompts_file: Path | None = None
    """With `--metrics paper`: also the PickScore of these prompts, one a line (Table 6)."""
    dense: bool = True
    """Score the unpruned teacher on the same captions too."""
    without_transport: Path | None = None
    """A run of `train.py --no-transport`, to be shown beside this one (Figs. 8 and 9)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    methods: str | None = None
    """Methods to compare, with commas between; see `METHODS`."""
    seeds: int = 1
    """Runs of each method, seeds 0, 1, ..."""
    target: str = "emoji"
    """Comparison: captioned images to prune on."""
    teacher: str | None = None
    """Comparison: the model to prune; by target if not given."""
    budget: float = 0.78
    """Comparison: share of the teacher's MACs."""
    num_experts: int = 8
    """Comparison: experts of APTP and its ablations."""
    data_dir: Path | None = None
    """Comparison: folder of the target's files, for coco and cc3m."""
    limit: int | None = None
    """Comparison: use only this many training prompts, for a quick trial; all if not given."""
    warmup_steps: int | None = None
    """Comparison: of train.py; by target if not given."""
    joint_steps: int | None = None
    """Comparison: of train.py; by target if not given."""
    finetune_steps: int | None = None
    """Comparison: fine-tuning steps of each of APTP's experts; others get as many in all."""
    out: Path | None = None
    """Comparison: its folder; runs/compare-<target>-<budget> if not given."""


def score(cfg: Config, run: Path) -> dict[str, Any]:
    """Draw and score the captions of a run, and write its report.

    Gives what <run>/report/metrics.json then holds. Raises `UserError` for what the user can mend.
    """
    check(cfg)
    pipeline = APTPPipeline.from_pretrained(run, cfg.device)
    summary, settings = read_json(run / "summary.json"), read_json(run / "config.json")
    suite = SUITES[cfg.metrics](pipeline.teacher.device)
    method, experts = summary.get("method", "aptp"), summary["experts"]
    found: list[dict[str, Any]] = []
    common, routed, samples = [], {}, []
    assigned = read_json(run / "assignments.json")
    for split in SPLITS:
        data = load_split(settings, split, pipeline.teacher.resolution)
        rows = readable(data, spread(len(data), cfg.images))
        real = Subset(data, rows)
        drawn = {method: draw(pipeline, data.captions, split, rows, cfg, None)}
        if cfg.dense and method != "dense":
            drawn["dense"] = draw(pipeline, data.captions, split, rows, cfg, -1)
        for name, pictures in drawn.items():
            found.append(costs(pipeline, name, split, pictures) | suite(pictures, real))
        if cfg.dense:
            ceiling = suite(Reconstructed(pipeline.teacher, real), real)
            found.append({"method": "autoencoder", "split": split, "images": len(rows)} | ceiling)
        routed[split] = Routed(data.captions, data.groups, assigned[split])
        if any(data.groups) and len(experts) > 1:
            common.append(in_common(data, assigned[split], split))
        if split == "validation":
            samples = examples(pipeline, data, drawn[method], drawn.get("dense"))
    if cfg.prompts_file:
        found += free_prompts(pipeline, method, cfg)
    metrics_json = {"rows": found, "nmi": common, "settings": as_json(cfg)}
    inputs = Inputs(
        summary,
        routed["train"],
        routed["validation"],
        load_codes(run, pipeline.space),
        measure_macs(
            pipeline.teacher.unet,
            pipeline.space,
            latent_size=pipeline.teacher.latent_size,
            text_tokens=pipeline.teacher.text_tokens,
        ),
        metrics_json,
        samples,
        same_prompt(pipeline, cfg, summary["target"]) if len(experts) > 1 else (),
        cfg.without_transport,
    )
    page = write_report(run, inputs)
    write_json(run / "report" / "metrics.json", metrics_json)  # last: the run is scored
    print(f"wrote {page}")
    return metrics_json


def costs(pipeline: APTPPipeline, method: str, split: str, drawn: Drawn) -> dict[str, Any]:
    """Who drew what, and what it took, per picture: MACs ratio and seconds."""
    ratios = [1.0 if i < 0 else pipeline.ratios[i] for i in drawn.experts]
    return {
        "method": method,
        "split": split,
        "images": len(drawn),
        "macs_ratio": sum(ratios) / len(drawn),
        "seconds": sum(drawn.seconds) / len(drawn),
    }


def free_prompts(pipeline: APTPPipeline, method: str, cfg: Config) -> list[dict[str, Any]]:
    """PickScores of the prompts of a file, such as PartiPrompts' (Table 6)."""
    assert cfg.prompts_file
    extractor = load_extractor("pickscore", pipeline.teacher.device)
    prompts, found = read_prompts(cfg.prompts_file), []
    rows = list(range(len(prompts)))
    for name, expert in ((method, None), ("dense", -1)):
        if expert is None or (cfg.dense and method != "dense"):
            drawn = draw(pipeline, prompts, "prompts", rows, cfg, expert)
            score = metrics.pick_score(drawn, prompts, extractor)
            found.append(costs(pipeline, name, "prompts", drawn) | {"pick_score": score})
    return found


def examples(
    pipeline: APTPPipeline, data: CaptionedImages, drawn: Drawn, dense: Drawn | None, most: int = 8
) -> list[Sample]:
    """Up to `most` drawings of each expert, beside the teacher's."""
    count: Counter[int] = Counter()
    found = []
    for row, expert in zip(drawn.rows, drawn.experts, strict=True):
        count[expert] += 1
        if count[expert] <= most:
            teacher = None if dense is None else dense.picture(row)
            ratio = pipeline.ratios[expert]
            found.append(Sample(data.captions[row], expert, ratio, drawn.picture(row), teacher))
    return found


def same_prompt(pipeline: APTPPipeline, cfg: Config, target: str) -> list[Sample]:
    """Two prompts through every expert and the teacher, from one seed."""
    found = []
    prompts = [f"{thing}, flat emoji" if target == "emoji" else thing for thing in SHOWN]
    options: dict[str, Any] = {
        "seeds": [cfg.seed] * len(prompts),
        "num_inference_steps": cfg.steps,
        "guidance_scale": cfg.guidance,
    }
    dense = pipeline(prompts, expert=-1, **options).images
    for i, ratio in enumerate(pipeline.ratios):
        images = pipeline(prompts, expert=i, **options).images
        found += [
            Sample(prompt, i, ratio, image, teacher)
            for prompt, image, teacher in zip(prompts, images, dense, strict=True)
        ]
    return found


def check(cfg: Config) -> None:
    """Raises `UserError` for settings that cannot work."""
    if cfg.metrics not in SUITES:
        raise UserError(f"--metrics {cfg.metrics} is unknown; choose one of: {', '.join(SUITES)}")
    if cfg.prompts_file and cfg.metrics != "paper":
        raise UserError(
            f"--prompts-file {cfg.prompts_file} is for PickScore; add --metrics paper, or leave it"
        )
    for name, value, least in (
        ("images", cfg.images, 2),
        ("steps", cfg.steps, 1),
        ("seeds", cfg.seeds, 1),
        ("batch-size", cfg.batch_size, 1),
    ):
        if value < least:
            raise UserError(f"--{name} {value} is too small; choose {least} or more")


def evaluate(cfg: Config) -> None:
    """Score a run, or, with `methods`, compare several; prints what was found."""
    check(cfg)
    if cfg.methods is None:
        run = cfg.run or newest_run()
        print(markdown("Scores", aggregate(score(cfg, run)["rows"])))
        return
    methods = parse_methods(cfg.methods)
    pruning = Pruning(
        target=cfg.target,
        teacher=cfg.teacher,
        budget=cfg.budget,
        num_experts=cfg.num_experts,
        data_dir=cfg.data_dir,
        limit=cfg.limit,
        warmup_steps=cfg.warmup_steps,
        joint_steps=cfg.joint_steps,
        device=cfg.device,
    )
    steps = cfg.finetune_steps or by_target(cfg.target)["steps"]
    folder = cfg.out or RUNS / f"compare-{cfg.target}-{cfg.budget:g}"
    tuning = Finetuning(device=cfg.device)
    alone = replace(cfg, dense=False)
    compare(folder, methods, cfg.seeds, steps, pruning, tuning, lambda run: score(alone, run))
    print((folder / "tables.md").read_text(encoding="utf-8"))


def main() -> None:
    evaluate(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    command_line(main)


APTP: dict[str, dict[str, Any]] = {
    "aptp": {},
    "contrastive": {"transport": False, "distill": False},
    "transport": {"distill": False},
}

METHODS = (*APTP, *baselines.METHODS)

TABLE_3 = ("uni-arch", "contrastive", "transport", "aptp")

RUN_FILES = (  # of the pruning stage
    "config.json",
    "router.safetensors",
    "codes.safetensors",
    "assignments.json",
    "metrics.csv",
    "summary.json",
)


def parse_methods(text: str) -> list[str]:
    """Methods named with commas between. Raises `UserError` for one that does not exist."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name} is unknown; choose among: {', '.join(METHODS)}")
    if not names:
        raise UserError(f"--methods names none; choose among: {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def prune(method: str, cfg: Pruning) -> None:
    """Make the run folder `cfg.out` of a method, unless it is there. Raises `UserError`."""
    if method in APTP:
        train.train(replace(cfg, **APTP[method]))
        return
    depth = baselines.DEPTHS.get(method, cfg.depth)
    cfg = resolve(replace(cfg, num_experts=1, depth=depth))
    assert cfg.out
    settings = as_json(cfg) | {"method": method}
    claim(cfg.out, settings, free=FREE)
    if (cfg.out / "summary.json").exists():
        return
    problem = prepare(cfg)
    write_json(cfg.out / "config.json", settings)
    code = baselines.METHODS[method](problem)  # (1, D)
    router = PromptRouter(problem.z.shape[1], problem.space.size, 1)
    write_results(cfg, problem, router, {}, codes=code, method=method)


def finetuned(run: Path, method: str, steps: int, cfg: Finetuning) -> Path:
    """A copy of a pruned run whose experts are fine-tuned for `steps` steps each."""
    folder = run.with_name(f"{run.name}@{steps}")
    if not (folder / "summary.json").exists():
        for name in RUN_FILES:  # the summary last: a folder without it is copied again
            if (run / name).exists():
                with replacing(folder / name) as temporary:
                    shutil.copyfile(run / name, temporary)
    if method != "dense":
        finetune.finetune(replace(cfg, run=folder, steps=steps))
    return folder


def compare(
    folder: Path,
    methods: Sequence[str],
    seeds: int,
    steps: int,
    pruning: Pruning,
    tuning: Finetuning,
    score: Callable[[Path], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Make and score every cell that is missing; write the tables after each.

    Args:
        folder: of the comparison.
        methods: of `METHODS`.
        seeds: how many of each.
        steps: fine-tuning steps of one of APTP's experts.
        pruning, tuning: settings that all cells share.
        score: scores a run folder: its metrics.json.

    Returns:
        The scores of all cells, flat dictionaries.
    """
    cells = [(method, seed) for seed in range(seeds) for method in methods]
    for number, (method, seed) in enumerate(cells, start=1):
        print(f"--- cell {number} of {len(cells)}: {method}, seed {seed}", flush=True)
        run = folder / f"{method}-{seed}"
        prune(method, replace(pruning, seed=seed, out=run))
        experts = read_json(run / "summary.json")["num_experts"]
        own = steps * pruning.num_experts // experts
        done = finetuned(run, method, own, replace(tuning, seed=seed))
        if not (done / "report" / "metrics.json").exists():
            score(done)
        write_tables(folder)
    return collect(folder)


def collect(folder: Path) -> list[dict[str, Any]]:
    """The scores of all cells that are there, each with its method, seed and steps."""
    rows = []
    for path in sorted(folder.glob("*@*/report/metrics.json")):
        name, steps = path.parent.parent.name.rsplit("@", 1)
        method, seed = name.rsplit("-", 1)
        experts = read_json(path.parent.parent / "summary.json")["num_experts"]
        for row in read_json(path)["rows"]:
            if row["method"] == method:
                cell = {
                    "seed": int(seed),
                    "steps": int(steps),
                    "steps_in_all": int(steps) * experts,
                }
                rows.append(row | cell)
    order = {method: place for place, method in enumerate(METHODS)}
    return sorted(
        rows, key=lambda r: (r["split"], r["steps_in_all"], order[r["method"]], r["seed"])
    )


def write_tables(folder: Path) -> None:
    """Write metrics.json, tables.md and tables.csv of a comparison from its cells so far."""
    rows = collect(folder)
    lines = aggregate(rows)
    write_json(folder / "metrics.json", {"cells": rows, "means": as_numbers(lines)})
    pictures = [line for line in lines if line["split"] != "prompts"]
    parts = {"Table 1: methods at one budget": pictures}
    ablation = [line for line in pictures if line["method"] in TABLE_3]
    if {"contrastive", "transport"} & {line["method"] for line in ablation}:
        place = {method: k for k, method in enumerate(TABLE_3)}
        ablation.sort(key=lambda line: (line["split"], place[line["method"]]))
        parts["Table 3: ablation"] = ablation
    if len({line["steps_in_all"] for line in pictures if line["method"] != "dense"}) > 1:
        by_steps = sorted(
            pictures, key=lambda line: (line["split"], line["method"], line["steps_in_all"])
        )
        parts["Table 5: by fine-tuning steps"] = by_steps
    prompts = [line for line in lines if line["split"] == "prompts"]
    if prompts:
        parts["Table 6: free prompts"] = prompts
    with replacing(folder / "tables.md") as temporary:
        text = "\n".join(markdown(title, part) for title, part in parts.items() if part)
        temporary.write_text(text, encoding="utf-8")
    columns = sorted(
        {key for line in lines for key in line}, key=lambda key: (key != "method", key)
    )
    with (
        replacing(folder / "tables.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, ["table", *columns])
        writer.writeheader()
        for title, part in parts.items():
            writer.writerows({"table": title.split(":")[0]} | line for line in part)

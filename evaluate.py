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

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import finetune
import metrics
import train
from analysis import Routed
from cache import kept_rows, rows_key
from comparison import aggregate, compare, markdown, parse_methods
from data import CaptionedImages, spread
from drawings import Drawn, draw
from features import Rows, extract, load_extractor
from figures import Sample
from finetune import load_codes
from macs import measure_macs
from metrics import EMBEDDED_SIGMA
from report import Inputs, write_report
from results import load_split
from runfolder import (
    RUNS,
    UserError,
    as_json,
    command_line,
    newest_run,
    read_json,
    write_json,
)
from sample import APTPPipeline, read_prompts
from teacher import Teacher

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
    """Methods to compare, with commas between; see `comparison.METHODS`."""
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


# ---- scoring ----


@dataclass(frozen=True)
class Subset:
    """Some rows of a target's split, read when asked for."""

    data: CaptionedImages
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        return self.data.images([self.rows[int(position)] for position in positions])


@dataclass(frozen=True)
class Reconstructed:
    """Pictures after a way through the teacher's autoencoder: the best that it can draw."""

    teacher: Teacher
    pictures: Subset

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, positions: Sequence[int] | Tensor) -> Tensor:
        latents = self.teacher.encode_images(self.pictures.images(positions))
        return self.teacher.decode_latents(latents).float().cpu()


def readable(data: CaptionedImages, rows: list[int]) -> list[int]:
    """The rows, or, for those whose image cannot be decoded, the next that can; each one once."""
    batches = data.batches([rows[start : start + 64] for start in range(0, len(rows), 64)])
    return sorted({row for _, used in batches for row in used.tolist()})


class Embedded:
    """Scores in the features of an extractor that comes with a package."""

    def __init__(self, device: torch.device) -> None:
        self.extractor = load_extractor("efficientnet-lite0", device)
        self.classifier: Any = None  # of styles, fitted to the first split: the training pictures

    def gallery(self, data: CaptionedImages) -> Tensor:
        """Features of all real pictures of a split, (rows, d), from the cache or into it."""
        pixels = hashlib.sha256(data.images(spread(len(data), 8)).numpy().tobytes()).hexdigest()
        parts = kept_rows(
            f"features-{rows_key(self.extractor.name, pixels, lines=data.captions)}",
            len(data),
            lambda batches: (self.extractor(data.images(rows)) for rows in batches),
            part=4096,
            batch=64,
            what="features of real pictures",
        )
        return torch.cat(parts)

    def __call__(self, pictures: Tensor | Rows, real: Subset) -> dict[str, float]:
        """Frechet distance and MMD to the captions' own pictures, R-precision, style.

        The last two where the target has styles: is the caption's picture the nearest of its style,
        or among the nearest five, and would one say that it has that style?
        """
        styles = real.data.styles
        features = extract(self.extractor, pictures)
        gallery = self.gallery(real.data) if any(styles) else torch.empty(0)
        reference = gallery[real.rows] if any(styles) else extract(self.extractor, real)
        found = {
            "frechet": metrics.frechet_distance(features, reference),
            "mmd": metrics.mmd(metrics.unit(features), metrics.unit(reference), EMBEDDED_SIGMA),
        }
        if any(styles):
            if self.classifier is None:
                self.classifier = metrics.style_classifier(gallery, styles)
            pools = [styles[row] for row in real.rows], styles
            found["style"] = metrics.style_accuracy(self.classifier, features, pools[0])
            for k in (1, 5):
                truth = torch.tensor(real.rows)
                found[f"r{k}"] = metrics.r_precision(features, gallery, truth, k, pools)
        return found


class Published:
    """The paper's scores: FID in both of clean-fid's modes, CLIP score and CMMD (App. E.3)."""

    def __init__(self, device: torch.device) -> None:
        names = ("inception", "inception-legacy", "clip-vit-b-32", "clip-vit-l-14-336")
        self.extractors = {name: load_extractor(name, device) for name in names}

    def __call__(self, pictures: Rows, real: Subset) -> dict[str, float]:
        """Scores of the pictures of the captions whose own pictures are `real`."""
        clean, legacy, clip, large = self.extractors.values()
        captions = [real.data.captions[row] for row in real.rows]
        return {
            "fid": metrics.fid(real, pictures, extractor=clean),
            "fid_legacy": metrics.fid(real, pictures, extractor=legacy),
            "clip_score": metrics.clip_score(pictures, captions, clip),
            "cmmd": metrics.cmmd(real, pictures, large),
        }


SUITES: dict[str, Callable[[torch.device], Embedded | Published]] = {
    "embedded": Embedded,
    "paper": Published,
}


def in_common(captions: CaptionedImages, experts: list[int], split: str) -> dict[str, Any]:
    """How much expert and group have in common, beside a shuffled control."""
    found: dict[str, Any] = {"split": split, "prompts": len(experts)}
    found["nmi"] = metrics.nmi(experts, captions.groups)
    found["shuffled"] = metrics.shuffled_nmi(experts, captions.groups)
    return found


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
    pruning = train.Config(
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
    steps = cfg.finetune_steps or finetune.by_target(cfg.target)["steps"]
    folder = cfg.out or RUNS / f"compare-{cfg.target}-{cfg.budget:g}"
    tuning = finetune.Config(device=cfg.device)
    alone = replace(cfg, dense=False)
    compare(folder, methods, cfg.seeds, steps, pruning, tuning, lambda run: score(alone, run))
    print((folder / "tables.md").read_text(encoding="utf-8"))


def main() -> None:
    evaluate(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    command_line(main)

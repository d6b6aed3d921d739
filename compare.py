"""Compares methods, seeds, fine-tuning protocols and ablations: Tables 1, 3 and 5, Fig. 5.

    python compare.py --methods aptp,norm,sp,bksdm,random,uni-arch,dense --budget 0.5 --seeds 3
    python compare.py --methods aptp,uni-arch --tuning cut,refit,refit+25,100,shared+800
    python compare.py --methods aptp,aptp:no-center,aptp:experts-16+depth-paper --budget 0.5 \\
        --tuning cut --distances-only          # ablations: what codes are worth as they were cut
    python compare.py --methods uni-arch,aptp:contrastive,aptp:transport,aptp   # Table 3

A method may carry a variant after a colon: settings of train.py, written as there but without the
leading dashes (`aptp:no-center`, `aptp:predictor-rate-1`), with `+` between several. `contrastive`
and `transport` are rows of Table 3; `random-clusters` gives each prompt a random expert, `by-group`
one for each group of the data set.

`--tuning` says what is done to the experts after they were cut, one or more of:

- `cut`: nothing; `refit`: what reads pruned features is solved anew (`refit.py`);
- `100`: fine-tuned, 100 steps each of APTP's experts; `refit+100`: refitted first;
- `shared+800`: one set of weights for all experts, trained for 800 steps.

By the protocol `all`, other methods get as many steps and refitting images in all as APTP's experts
have together.

Each method, seed and tuning is a cell: an ordinary run folder, and a line of `cells.jsonl` with all
scores, those of single captions too, the processor's seconds that it took to make, and its experts'
measured latency. A killed command goes on where it was; several may fill one folder. The tables are
written anew after each cell.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import torch
from torch import Tensor

import baselines
import evaluate
import finetune
import train
from common.checkpoint import refuse_other_settings
from common.errors import UserError, command_line
from common.files import read_json, replacing, write_json
from common.randomness import step_generator
from common.ranges import Choice, Count, check
from evaluate import Scoring, distances_of
from evaluation.analysis import perplexity, read_log, shares
from evaluation.scores import as_row
from evaluation.tables import write_tables
from router import PromptRouter
from run import (
    Setup,
    as_json,
    check_resumable,
    load_split,
    measured_ratio,
    prepare,
    read_run,
    start_folder,
    write_results,
)
from sample import APTPPipeline
from settings import MACHINE, RUNS, Finetuning, Pruning, finetuning_of, read_with_preset, resolve

METHODS = ("aptp", *baselines.METHODS)
SEVERAL = ("aptp", *baselines.ROUTED)  # methods with `--num-experts` experts; the others have one
NAMED: dict[str, str] = {  # variants by another name: rows 2 and 3 of Table 3
    "contrastive": "no-transport+no-distill",
    "transport": "no-distill",
}
CLUSTERS = ("random-clusters", "by-group")  # controls of aptp: the experts are given, not learned
SHORT = {"experts-": "num-experts-"}
CELL, SPENT, ROUTING = "cell.json", "spent.json", "routing.json"
TUNINGS = "cut, refit, refit-IMAGES, a number of steps, refit+STEPS, shared+STEPS; commas between"
IMAGES = Finetuning().refit_images  # that `refit` alone stands for
PROTOCOLS = {"expert": ("expert",), "all": ("all",), "both": ("expert", "all")}
OF_ALL = (  # settings that all methods of a comparison share, so no variant changes them
    *("target", "teacher", "budget", "cost", "data_dir", "prompt_encoder", "limit", "seed"),
    *("resolution", "precision", *MACHINE),
)
MAY_DIFFER = (*MACHINE, "methods", "seeds", "seed", "protocol", "tuning", "distances_only")


@dataclass(frozen=True)
class Config(Scoring, Pruning):
    """All methods are pruned with the settings of train.py, fine-tuned alike, and scored."""

    HEADINGS: ClassVar[dict[str, str]] = Pruning.HEADINGS | {
        "images": "images and scores",
        "methods": "what is compared",
    }
    out: Path | None = None
    """Folder; runs/compare-<target>-<budget> if not given."""
    methods: str = "aptp"
    """Names with commas between; variants such as aptp:no-center."""
    seeds: Count = 1
    """Runs of each method, seeds --seed, --seed + 1, ..."""
    tuning: str | None = None
    """Names with commas between; refit and the target's steps."""
    protocol: Annotated[str, Choice(*PROTOCOLS)] = "all"
    """Equal steps for each expert (paper), or equal steps in all."""
    distances_only: bool = False
    """No images: distances to the teacher and routing alone."""


# ---- methods and their variants ----


@dataclass(frozen=True)
class Method:
    """A method, and what its variant changes."""

    name: str
    base: str
    changes: dict[str, Any] = field(default_factory=dict)  # settings of `Pruning`
    clusters: str | None = None

    def settings(self, cfg: Config, seed: int, out: Path) -> Pruning:
        """The pruning of one seed. Raises `UserError` for settings that cannot work."""
        shared = {f.name: getattr(cfg, f.name) for f in fields(Pruning)}
        pruning = Pruning(**shared | self.changes | {"seed": seed, "out": out})
        if self.base not in SEVERAL:
            pruning = replace(pruning, num_experts=1)
        return resolve(replace(pruning, depth=baselines.DEPTHS.get(self.base, pruning.depth)))


def setting(text: str) -> dict[str, Any]:
    """The setting that a part of a variant names; none where it names none.

    `no-center` -> {"center": False}, `experts-4` -> {"num_experts": 4}, `depth-paper`.
    """
    for short, long in SHORT.items():
        text = text.replace(short, long, 1) if text.startswith(short) else text
    hints = get_type_hints(Pruning)  # without ranges: what a word is made into
    for option in fields(Pruning):
        name, kind = option.name.replace("_", "-"), hints[option.name]
        if option.name in OF_ALL:
            continue
        if kind is bool:
            if text == ("no-" if option.default else "") + name:
                return {option.name: not option.default}
        elif text.startswith(f"{name}-"):
            value = text.removeprefix(f"{name}-")
            try:
                return {option.name: kind(value)}
            except ValueError:
                continue
    return {}


def parse_method(name: str) -> Method:
    """A method by its name. Raises `UserError` for one that does not exist."""
    base, _, variant = name.partition(":")
    if base not in METHODS:
        raise UserError(f"--methods {base} is unknown; choose among: {', '.join(METHODS)}")
    if variant in CLUSTERS and base == "aptp":
        return Method(name, base, clusters=variant)
    changes: dict[str, Any] = {}
    for part in NAMED.get(variant, variant).split("+") if variant else ():
        found = setting(part)
        if not found:
            raise UserError(
                f"--methods {name}: {part} is no setting; write one of train.py's without its "
                f"dashes, such as no-center or experts-4, or {', '.join((*NAMED, *CLUSTERS))}"
            )
        changes |= found
    return Method(name, base, changes)


def names_in(option: str, text: str) -> list[str]:
    """Names with commas between. Raises `UserError` where there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--{option} {text!r} names none; write some with commas between")
    return names


# ---- pruning ----


def prepared(cfg: Pruning, last: dict[Any, Setup], scored: bool) -> Setup:
    """What a method is given; that of the method before, where `prepare` would give the same."""
    key = (cfg.seed, cfg.depth, getattr(cfg, "by_content", None))  # the others are in `OF_ALL`
    if key not in last:
        last.clear()
        last[key] = prepare(cfg, scored)
    return replace(last[key], cfg=cfg)


def given_experts(clusters: str, setup: Setup) -> dict[str, Tensor]:
    """Of a control, the expert of each row by split, (rows,)."""
    splits = {"train": setup.data, "validation": setup.validation}
    if clusters == "random-clusters":
        generator = step_generator(setup.cfg.seed, "random clusters")
        N = setup.cfg.num_experts
        return {k: torch.randint(N, (len(v),), generator=generator) for k, v in splits.items()}
    names = {name: i for i, name in enumerate(sorted(set(setup.data.groups)))}
    # a validation group without training prompts has no expert of its own
    return {k: torch.tensor([names.get(g, 0) for g in v.groups]) for k, v in splits.items()}


@torch.no_grad()
def agreement(router: PromptRouter, setup: Setup) -> float:
    """Share of 2,048 training prompts whose expert is the one that the transport gives them."""
    order = torch.randperm(len(setup.z), generator=step_generator(0, "agreement"))[:2048]
    e = router(setup.z[order].to(setup.teacher.device))  # (2048, D)
    eps, iterations = setup.cfg.eps, setup.cfg.sinkhorn_iterations
    assigned = [router.transport_assignment(part, eps, iterations) for part in e.split(1024)]
    return (torch.cat(assigned) == router.nearest(e)).float().mean().item()


def prune(method: Method, cfg: Pruning, last: dict[Any, Setup], scored: bool = True) -> int:
    """Make the run folder `cfg.out`, unless it is there; returns how many experts it has.

    Raises `UserError`; see `prepare`.
    """
    assert cfg.out
    run, settings = cfg.out, as_json(cfg) | {"method": method.name}
    check_resumable(run, settings)
    if (run / ROUTING).exists():  # written last
        return read_run(run, "summary.json")[0]["num_experts"]
    with processor_seconds(run, "pruning"):
        setup = prepared(cfg, last, scored)
        start_folder(setup, settings)
        given, scores, seconds, routing = None, None, dict[str, float](), dict[str, float]()
        if method.clusters:
            given = given_experts(method.clusters, setup)
            cfg = replace(cfg, num_experts=int(given["train"].max()) + 1)
            setup = replace(setup, cfg=cfg)
        if method.base == "aptp":
            router, seconds = train.optimise(setup, given["train"] if given else None)
            if not given and cfg.num_experts > 1:
                routing["agreement"] = agreement(router, setup)
        else:
            router = setup.start_router()
            scores = baselines.METHODS[method.base](setup, router)  # (N, D) or (1, D)
            budget = baselines.BUDGETS.get(method.base, cfg.budget)
            setup = replace(setup, cfg=replace(cfg, budget=budget))
        if (run / "metrics.csv").exists():
            soft = read_log(run / "metrics.csv")["cost_ratio"]
            routing["soft_ratio"] = float(soft[-max(1, len(soft) // 4) :].mean())
        write_results(setup, router, seconds, scores=scores, method=method.name, given=given)
    write_json(run / ROUTING, routing | measured_ratio(setup))
    (run / train.CHECKPOINT).unlink(missing_ok=True)
    return read_run(run, "summary.json")[0]["num_experts"]


@dataclass(frozen=True)
class Tuning:
    """What is done to experts after they were cut."""

    images: int = 0  # that an expert is refitted on; 0: it is not
    shared: bool = False
    steps: int = 0  # of each expert, or of the shared weights

    def __str__(self) -> str:
        """As in `--tuning`: cut, refit, refit-4096, 100, refit+100, shared+800."""
        kind = "shared" if self.shared else "refit" if self.images else ""
        if self.images not in (0, IMAGES):
            kind += f"-{self.images}"
        return "+".join(filter(None, (kind, str(self.steps or "")))) or "cut"

    def steps_in_all(self, num_experts: int) -> int:
        return self.steps * (1 if self.shared else num_experts)

    def of_method(self, num_experts: int, of_aptp: int, protocol: str) -> Tuning:
        """The same for a method with another number of experts than APTP's."""
        if protocol == "expert" or self.shared:
            return self
        steps, images = (n * of_aptp // num_experts for n in (self.steps, self.images))
        return replace(self, steps=steps, images=images)


def parse_tuning(name: str) -> Tuning:
    """A tuning by its name. Raises `UserError` for one that does not exist."""
    tuning = Tuning()
    for part in name.split("+"):
        if part == "shared":
            tuning = replace(tuning, shared=True)
        elif part.isdecimal():
            tuning = replace(tuning, steps=int(part))
        elif match := re.fullmatch(r"refit(?:-(\d+))?", part):
            tuning = replace(tuning, images=int(match[1] or IMAGES))
    if str(tuning) != name or (tuning.shared and not tuning.steps):
        raise UserError(f"--tuning {name} is unknown; write {TUNINGS}")
    return tuning


def tuned(run: Path, tuning: Tuning, cfg: Finetuning) -> Path:
    """A copy of a pruned run whose experts are tuned; itself where nothing is done to them."""
    if tuning == Tuning():
        return run
    folder = run.with_name(f"{run.name}@{tuning}")
    if not (folder / "summary.json").exists():
        files = [path for path in run.iterdir() if path.is_file() and path.name != CELL]
        for path in sorted(files, key=lambda path: path.name == "summary.json"):
            with replacing(folder / path.name) as temporary:  # the summary last: it is complete
                shutil.copyfile(path, temporary)
    how: Any = {"refit": bool(tuning.images), "shared": tuning.shared, "steps": tuning.steps}
    if tuning.images:
        how["refit_images"] = tuning.images
    with processor_seconds(folder, "tuning"):
        finetune.finetune(replace(cfg, run=folder, **how))
    return folder


@contextmanager
def processor_seconds(run: Path, stage: str) -> Iterator[None]:
    """Add the seconds that this process's threads worked to the run's spent.json.

    Those of a process that was stopped by Ctrl-C or an error are in it already; a killed one's not.
    """
    path, start = run / SPENT, time.process_time()
    try:
        yield
    finally:
        if run.exists():  # not where settings were refused
            spent = read_json(path) if path.exists() else {}
            seconds = spent.get(stage, 0.0) + time.process_time() - start
            write_json(path, spent | {stage: round(seconds, 1)})


# ---- cells ----

Key = tuple[str, int, str]  # method, seed, tuning


def key_of(cell: dict[str, Any]) -> Key:
    return cell["method"], cell["seed"], cell["tuning"]


def read_cells(folder: Path) -> dict[Key, dict[str, Any]]:
    """The finished cells of a comparison: those of cells.jsonl, and of its run folders."""
    path = folder / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        cells = {key_of(cell): cell for cell in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged; delete it: the run folders beside it hold the cells"
        ) from None
    for found in sorted(folder.glob(f"*/{CELL}")):
        cell = read_json(found)
        cells[key_of(cell)] = cell
    place = {method: number for number, method in enumerate(METHODS)}
    return dict(sorted(cells.items(), key=lambda c: (place[c[0][0].partition(":")[0]], c[0])))


def is_finished(cell: dict[str, Any] | None, cfg: Config) -> bool:
    """Whether a cell has what is asked for: images, or distances alone."""
    if cell is None:
        return False
    return cfg.distances_only or all("images" in row for row in cell["scores"])


def distances(run: Path, method: str, device: str) -> list[dict[str, Any]]:
    """The scores of a run's experts, without images."""
    pipeline = APTPPipeline.from_pretrained(run, device, precision="fp32")
    settings, assigned = read_run(run, "config.json", "assignments.json")
    found = []
    for split in ("train", "validation"):
        data = load_split(run, settings, assigned, split, pipeline.teacher.resolution)
        values = distances_of(pipeline, data, assigned[split])
        ratio = sum(pipeline.ratios[i] for i in assigned[split]) / len(data)
        found.append({"method": method, "split": split, "macs_ratio": ratio} | as_row(values))
    return found


def measure(cfg: Config, run: Path, method: str, seed: int, tuning: Tuning) -> dict[str, Any]:
    """Score a cell, and write it into its run folder."""
    if cfg.distances_only:
        scores = distances(run, method, cfg.device)
    else:
        how = {f.name: getattr(cfg, f.name) for f in fields(Scoring)}
        scoring = evaluate.Config(**how, device=cfg.device, precision="fp32", dense=False)
        scores = evaluate.score(scoring, run)["rows"]
    summary, assigned = read_run(run, "summary.json", "assignments.json")
    share = shares(assigned["train"], summary["num_experts"])  # (N,)
    cell = {
        "method": method,
        "seed": seed,
        "tuning": str(tuning),
        "steps_in_all": tuning.steps_in_all(summary["num_experts"]),
        "processor_seconds": read_json(run / SPENT),
        **{name: summary[name] for name in ("target", "budget", "num_experts", "seconds")},
        "ratios": [expert["macs_ratio"] for expert in summary["experts"]],
        "shares": share.tolist(),
        "perplexity": perplexity(share),
        **read_json(run / ROUTING),
        "scores": scores,
    }
    write_json(run / CELL, cell)
    return cell


def write_cells(folder: Path) -> None:
    """Write cells.jsonl, and the tables made from it."""
    cells = read_cells(folder)
    lines = [json.dumps(cell, ensure_ascii=False) + "\n" for cell in cells.values()]
    with replacing(folder / "cells.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    write_tables(folder, list(cells.values()))


# ---- the comparison ----


def check_folder(folder: Path, cfg: Config) -> None:
    """Refuse a comparison that was made with other settings. Raises `UserError`."""
    settings = {k: v for k, v in as_json(cfg).items() if k not in MAY_DIFFER}
    path = folder / "config.json"
    if path.exists():
        refuse_other_settings(path, read_json(path), settings)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no comparison; choose another --out")
    else:
        write_json(path, settings)


def compare(cfg: Config) -> Path:
    """Make and score every cell that is missing; returns the comparison's folder.

    Raises `UserError`.
    """
    check(cfg)
    methods = [parse_method(name) for name in names_in("methods", cfg.methods)]
    folder = cfg.out or RUNS / f"compare-{Path(cfg.target).resolve().name}-{cfg.budget:g}"
    own = replace(finetuning_of(cfg.target), device=cfg.device, precision=cfg.precision)
    tunings = [
        parse_tuning(name) for name in names_in("tuning", cfg.tuning or f"refit+{own.steps}")
    ]
    runs = [
        (
            method,
            seed,
            method.settings(cfg, seed, folder / f"{method.name}-{seed}".replace(":", "-")),
        )
        for seed in range(cfg.seed, cfg.seed + cfg.seeds)
        for method in methods
    ]
    if cfg.dry_run:
        print("\n".join(str(pruning.out) for *_, pruning in runs))
        return folder
    check_folder(folder, cfg)
    last: dict[Any, Setup] = {}
    for number, (method, seed, pruning) in enumerate(runs, start=1):
        print(f"--- run {number} of {len(runs)}: {method.name}, seed {seed}", flush=True)
        assert pruning.out
        N = prune(method, pruning, last, scored=not cfg.distances_only)
        wanted = {
            tuning.of_method(N, cfg.num_experts, protocol): None
            for tuning in (tunings if method.base != "dense" else [Tuning()])
            for protocol in PROTOCOLS[cfg.protocol]
        }
        for tuning in wanted:
            if not is_finished(read_cells(folder).get((method.name, seed, str(tuning))), cfg):
                run = tuned(pruning.out, tuning, replace(own, seed=seed))
                measure(cfg, run, method.name, seed, tuning)
            write_cells(folder)
    return folder


def main() -> None:
    folder = compare(read_with_preset(Config, sys.argv[1:], __doc__))
    if (folder / "tables.md").exists():
        print((folder / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    command_line(main, goes_on=True)

"""Hyperparameters and their ranges: nothing that cannot work gets as far as being loaded."""

import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import compare
import evaluate
import finetune
import plan
import prune_unet
import router
import sample
import settings
import train
from common.errors import UserError, command_line
from common.files import write_json
from common.ranges import RANGES, check_ranges
from common.runs import NEEDED
from settings import AS_PRINTED, FINETUNING, PRESETS, PRINTED, PRUNING, Finetuning, Pruning
from targets import __main__ as describe
from teacher.pocket import model_card, pretrain

CONFIGS: dict[Any, Any] = {  # a script's module -> its configuration
    train: Pruning,
    finetune: Finetuning,
    sample: sample.Config,
    evaluate: evaluate.Config,
    compare: compare.Config,
    prune_unet: plan.Table,
    describe: describe.Config,
    pretrain: pretrain.Config,
    model_card: model_card.Config,
}
ANY = {"open_logit"}
MAY_BE_ZERO = ANY | {
    "warmup_steps", "transport_rows", "lr_warmup", "lr_decay", "predictor_rate", "weight_decay",
    "lambda_distill", "block_weight", "lambda_res", "lambda_cont", "caption_dropout", "seed",
    "expert", "alpha_ddpm", "alpha_distill", "guidance", "guidances", "guidance_scale",
    "noisy_share", "text_noise", "sentence_share", "latent_noise", "moment_weight", "edge_weight",
    "square_weight", "vae_ema_decay", "unet_ema_decay", "finetune_steps",
}  # fmt: skip
HUGE = 2**70


def parts(kind: Any) -> set[Any]:
    """The types in a union or a tuple."""
    inner = get_args(kind)
    return set().union(*map(parts, inner)) if inner else {kind}


def numbers(config: Any) -> dict[str, type]:
    """The fields that hold numbers -> int or float."""
    hints = get_type_hints(config)
    found = {field.name: parts(hints[field.name]) & {int, float} for field in fields(config)}
    return {name: kinds.pop() for name, kinds in found.items() if kinds}


def bad_values(name: str, kind: type) -> Iterator[Any]:
    """Numbers that a field must refuse."""
    if kind is float:
        yield from (math.nan, math.inf, -math.inf)
    else:
        yield HUGE
    if name not in ANY:
        yield kind(-1)
    if name not in MAY_BE_ZERO:
        yield kind(0)


def test_numbers_are_found_in_every_kind_of_field():
    found = numbers(Pruning)
    assert found["budget"] is float and found["lr"] is float and found["limit"] is int
    assert not {"target", "hold_budget", "out"} & found.keys()
    assert numbers(model_card.Config)["guidances"] is float
    assert all(is_dataclass(config) for config in CONFIGS.values())


def test_every_number_has_a_range_and_every_range_a_number():
    found = set().union(*(numbers(config) for config in CONFIGS.values()))
    assert found == RANGES.keys()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.__module__)
def test_ranges_refuse_what_cannot_be(config):
    check_ranges(config())
    for name, kind in numbers(config).items():
        for value in bad_values(name, kind):
            given = (3.0, value) if name == "guidances" else value
            with pytest.raises(UserError) as refused:
                check_ranges(replace(config(), **{name: given}))
            message = str(refused.value)
            assert message.startswith(f"--{name.replace('_', '-')} ") and "choose " in message
            assert "\n" not in message


@pytest.mark.parametrize("name", sorted(MAY_BE_ZERO - {"guidances"}))
def test_ranges_allow_what_can_be(name):
    config = next(config for config in CONFIGS.values() if name in numbers(config))
    check_ranges(replace(config(), **{name: 0}))


def test_all_defaults_are_in_range(tmp_path):
    for target in ("emoji", "coco"):
        for options in ({}, {"as_printed": True}):
            cfg = settings.resolve(Pruning(target=target, out=tmp_path / "none", **options))
            check_ranges(cfg)
            assert all(
                getattr(cfg, name) is not None
                for name in PRUNING[target if target in PRUNING else "paper"]
            )
        check_ranges(settings.resolve_finetuning(Finetuning(), target))
    for preset in PRESETS.values():
        check_ranges(settings.resolve(Pruning(**preset)))


# ---- through the commands ----


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """script(module, arguments): its exit code and what it said; it must load nothing."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was loaded")

    for module, name in (
        (train, "prepare"),
        (finetune, "load_teacher"),
        (sample.APTPPipeline, "from_pretrained"),
        (evaluate.APTPPipeline, "from_pretrained"),
        (compare, "prepare"),
        (pretrain, "load_target"),
        (model_card, "load_teacher"),
    ):
        monkeypatch.setattr(module, name, loaded)
    monkeypatch.chdir(tmp_path)

    def call(module: Any, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line(module.main)
        said = capsys.readouterr()
        return stopped.value.code, said.err + said.out

    return call


def arguments_of(module: Any, folder: Path) -> list[str]:
    """What a script is given beside the number, and where it would write."""
    run = folder / "run"
    if module is finetune:
        for name, needed in NEEDED.items():
            write_json(run / name, dict.fromkeys(needed, 0) | {"target": "emoji", "num_experts": 2})
        return ["--run", str(run)]
    if module is sample:
        return ["a giraffe", "--run", str(run), "--out", str(folder / "out")]
    if module is evaluate:
        return ["--run", str(run)]
    return [] if module is prune_unet else ["--out", str(folder / "out")]


@pytest.mark.parametrize(
    "module", [m for m in CONFIGS if m is not describe], ids=lambda module: module.__name__
)
def test_a_number_out_of_range_is_one_line_and_leaves_nothing(module, script, tmp_path):
    """As words, as a user would type them; of `train.py` all, of the others one a field."""
    given = arguments_of(module, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, kind in numbers(CONFIGS[module]).items():
        values = list(bad_values(name, kind))
        for value in values if module is train else values[-1:]:
            option = f"--{name.replace('_', '-')}"
            code, said = script(module, *given, f"{option}={value}")
            lines = said.strip().splitlines()
            assert code == 2 and len(lines) == 1, (option, value, said)
            assert lines[0].startswith(f"error: {option} "), lines
    assert sorted(tmp_path.rglob("*")) == before


def test_no_number_at_all_is_refused_too(script, tmp_path):
    for name, kind in numbers(Pruning).items():
        words = ("x", "") if kind is float else ("nan", "1.5")
        for word in words:
            code, _ = script(train, f"--{name.replace('_', '-')}={word}", "--out", "run")
            assert code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [train, sample, pretrain, model_card], ids=lambda m: m.__name__)
def test_a_folder_that_cannot_be_written_is_refused_at_once(module, script, tmp_path):
    given = arguments_of(module, tmp_path)
    given = given[: given.index("--out")]
    (tmp_path / "file").write_text("not a folder")
    places = [tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")]
    if os.geteuid():  # root may write anywhere else
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "run")
    for place in places:
        code, said = script(module, *given, "--out", str(place))
        lines = said.strip().splitlines()
        assert code == 2 and len(lines) == 1, said
        assert str(place) in lines[0] and "cannot be written" in lines[0]


def test_what_does_not_go_together_is_refused(script):
    for words, found in (
        (["--batch-size=1", "--num-experts=1"], "--batch-size 1"),
        (["--num-experts=65"], "--batch-size 64"),
        (["--limit=7"], "--num-experts 8"),
        (["--depth=most"], "paper, all, none"),
        (["--precision=int4"], "bf16"),
        (["--preset=coco-huge"], "coco-base"),
    ):
        code, said = script(train, *words, "--out", "run")
        assert code == 2 and len(said.strip().splitlines()) == 1 and found in said, said
    assert not Path("run").exists()


# ---- as printed ----


def switches() -> set[str]:
    """The switches that the modules' headers name among their departures from the paper."""
    of_train = train.__doc__[train.__doc__.index("Departures") :]
    names = re.findall(r"`--(?:no-)?([a-z-]+)`", of_train)
    names += re.findall(r"`(\w+)=False`", router.__doc__)
    return {name.replace("-", "_") for name in names}


def test_as_printed_turns_every_departure_off(tmp_path):
    cfg = settings.resolve(Pruning(as_printed=True, out=tmp_path / "none"))
    assert {name: getattr(cfg, name) for name in AS_PRINTED} == AS_PRINTED
    on = {field.name for field in fields(Pruning) if field.default is True}
    assert {name for name in on if getattr(cfg, name)} == {"transport", "distill"}  # the paper's
    assert len(switches()) > 8 and switches() <= {*AS_PRINTED, *PRINTED["paper"], "as_printed"}
    usual = settings.resolve(Pruning(out=tmp_path / "none"))
    for name, value in AS_PRINTED.items():
        assert getattr(usual, name) != value, f"{name} is as printed anyway"


def test_as_printed_has_the_values_of_appendix_e(tmp_path):
    cfg = settings.resolve(Pruning(target="coco", as_printed=True, out=tmp_path / "none"))
    printed = {
        "warmup_steps": 500, "joint_steps": 2500, "batch_size": 1024, "micro_batch": 64,
        "lr": 2e-4, "lr_warmup": 100, "lambda_distill": 0.2, "lambda_res": 2.0,
        "lambda_cont": 100.0, "gumbel_temp": 0.4, "contrast_temp": 0.03, "eps": 0.05,
        "sinkhorn_iterations": 3,
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in printed} == printed
    assert "mpnet" in cfg.prompt_encoder
    tuning = settings.resolve_finetuning(Finetuning(), "coco")
    printed = {"steps": 30_000, "batch_size": 128, "lr": 1e-5, "alpha_ddpm": 1e-4}
    assert {name: getattr(tuning, name) for name in printed} == printed
    assert set(PRINTED) == set(PRUNING) and FINETUNING["paper"]["steps"] == 30_000


def test_as_printed_overrules_switches_but_not_other_numbers(tmp_path):
    given = {"hold_budget": True, "transport_rows": 99, "lr": 1e-3, "joint_steps": 7}
    cfg = settings.resolve(Pruning(as_printed=True, out=tmp_path / "none", **given))
    assert not cfg.hold_budget and cfg.transport_rows == 0
    assert cfg.lr == 1e-3 and cfg.joint_steps == 7


# ---- presets ----


def test_presets_are_table_values_that_arguments_overrule():
    for name, (budget, experts) in {
        "coco-base": (0.78, 8),
        "coco-small": (0.64, 8),
        "cc3m-base": (0.85, 16),
        "cc3m-small": (0.66, 8),
    }.items():
        cfg = settings.read_pruning(["--preset", name], None)
        assert (cfg.budget, cfg.num_experts) == (budget, experts) and cfg.target == name[:4]
    cfg = settings.read_pruning(["--preset", "cc3m-base", "--budget", "0.5"], None)
    assert cfg.budget == 0.5 and cfg.num_experts == 16


def test_lists_of_fields_name_fields():
    assert set(settings.FREE) | AS_PRINTED.keys() <= {field.name for field in fields(Pruning)}
    assert set(settings.IDENTITY) <= {field.name for field in fields(Finetuning)}

"""Hyperparameters and their ranges: nothing that cannot work gets as far as being loaded."""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import pytest

import compare
import evaluate
import finetune
import latency
import sample
import settings
import train
from bench import units
from common.errors import UserError, command_line
from common.files import write_json
from common.ranges import Choice, Range, allowed, check
from run import NEEDED
from settings import EMOJI, PAPER, PRESETS, Finetuning, Pruning
from targets import __main__ as describe

CONFIGS: dict[Any, Any] = {  # a script's module -> its configuration
    train: Pruning,
    finetune: Finetuning,
    sample: sample.Config,
    evaluate: evaluate.Config,
    compare: compare.Config,
    units: units.Table,
    latency: latency.Config,
    describe: describe.Config,
}
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


def bounds(config: Any, name: str) -> Range:
    """The range that a field names."""
    found = allowed(get_type_hints(config, include_extras=True)[name])
    assert isinstance(found, Range), name
    return found


def bad_values(config: Any, name: str, kind: type) -> Iterator[Any]:
    """Numbers that a field must refuse."""
    range_ = bounds(config, name)
    yield from (math.nan, math.inf, -math.inf) if kind is float else (HUGE,)
    if range_.low > -math.inf:
        yield kind(range_.low - 1)
    if range_.above:
        yield kind(range_.low)
    if range_.high < math.inf:
        yield kind(range_.high + 1)


def test_numbers_are_found_in_every_kind_of_field():
    found = numbers(Pruning)
    assert found["budget"] is float and found["lr"] is float and found["limit"] is int
    assert not {"target", "hold_budget", "out"} & found.keys()
    assert all(is_dataclass(config) for config in CONFIGS.values())


@dataclass(frozen=True)
class Tried:
    share: Annotated[float, Range(0, 1)] = 0.5
    count: Annotated[int, Range(1, 9)] | None = None
    rate: Annotated[float, Range(0, above=True)] = 1.0
    several: tuple[Annotated[float, Range(0)], ...] = ()
    word: Annotated[str, Choice("a", "b")] = "a"


def test_a_field_says_what_it_may_be():
    for good in ({}, {"share": 0}, {"share": 1.0}, {"count": 9}, {"several": (0, 2.5)}):
        check(replace(Tried(), **good))
    check(Tried(word="b"))
    for bad, words in (
        ({"share": 1.1}, "--share 1.1 is out of range; choose 0 or more, and at most 1"),
        ({"count": 0}, "--count 0 is out of range; choose 1 or more, and at most 9"),
        ({"rate": 0.0}, "--rate 0 is out of range; choose more than 0"),
        ({"several": (1.0, -1.0)}, "--several -1 is out of range; choose 0 or more"),
        ({"rate": math.nan}, "--rate nan is out of range"),
        ({"word": "c"}, "--word c is unknown; choose one of: a, b"),
    ):
        with pytest.raises(UserError) as refused:
            check(replace(Tried(), **bad))
        assert str(refused.value).startswith(words)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.__module__)
def test_ranges_refuse_what_cannot_be(config):
    check(config())
    for name, kind in numbers(config).items():
        for value in bad_values(config, name, kind):
            with pytest.raises(UserError) as refused:
                check(replace(config(), **{name: value}))
            message = str(refused.value)
            assert message.startswith(f"--{name.replace('_', '-')} ") and "choose " in message
            assert "\n" not in message


def test_all_presets_are_in_range(tmp_path):
    for name, preset in PRESETS.items():
        check(settings.resolve(replace(preset, out=tmp_path / name)))
    for target in ("emoji", "coco", "my_pictures"):
        check(settings.pruning_of(target))
        check(settings.finetuning_of(target))
        assert settings.pruning_of(target).target == target
    assert settings.pruning_of("emoji") == EMOJI and EMOJI.teacher == "pocket"
    assert settings.pruning_of("my_pictures").teacher == PAPER.teacher


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
        (compare, "prepare"),
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
    if module in (finetune, evaluate):
        for name, needed in NEEDED.items():
            write_json(run / name, dict.fromkeys(needed, 0) | {"target": "emoji", "num_experts": 2})
        return ["--run", str(run)]
    if module is sample:
        return ["a giraffe", "--run", str(run), "--out", str(folder / "out")]
    if module is evaluate:
        return ["--run", str(run)]
    return [] if module is units else ["--out", str(folder / "out")]


@pytest.mark.parametrize(
    "module", [m for m in CONFIGS if m is not describe], ids=lambda module: module.__name__
)
def test_a_number_out_of_range_is_one_line_and_leaves_nothing(module, script, tmp_path):
    """As words, as a user would type them; of `train.py` all, of the others one a field."""
    given = arguments_of(module, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, kind in numbers(CONFIGS[module]).items():
        values = list(bad_values(CONFIGS[module], name, kind))
        for value in values if module is train else values[-1:]:
            option = f"--{name.replace('_', '-')}"
            code, said = script(module, *given, f"{option}={value}")
            lines = said.strip().splitlines()
            assert code == 2 and len(lines) == 1, (option, value, said)
            assert lines[0].startswith(f"error: {option} "), lines
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("module", [train, sample], ids=lambda m: m.__name__)
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


def test_as_printed_turns_every_departure_off():
    """A preset that differs from the usual one in all switches of their group, and in the steps."""
    for usual, printed in (("emoji", "emoji-as-printed"), ("coco-base", "coco-as-printed")):
        usual, printed = PRESETS[usual], PRESETS[printed]
        changed = {
            f.name for f in fields(Pruning) if getattr(usual, f.name) != getattr(printed, f.name)
        }
        switches = set(settings.group(Pruning, "hold_budget")) - {"open_logit"}
        assert printed.depth == "paper"
        assert changed - {"warmup_steps", "joint_steps", "lr", "lr_warmup", "depth"} == switches
    on = {f.name for f in fields(Pruning) if getattr(printed, f.name) is True}
    assert on == {"transport", "distill"}  # the paper's


def test_as_printed_has_the_values_of_appendix_e():
    cfg = PRESETS["coco-as-printed"]
    printed = {
        "warmup_steps": 500, "joint_steps": 2500, "batch_size": 1024, "micro_batch": 64,
        "lr": 2e-4, "lr_warmup": 100, "lambda_distill": 0.2, "lambda_res": 2.0,
        "lambda_cont": 100.0, "gumbel_temp": 0.4, "contrast_temp": 0.03, "eps": 0.05,
        "sinkhorn_iterations": 3,
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in printed} == printed
    assert "mpnet" in cfg.prompt_encoder
    tuning = settings.finetuning_of("coco")
    printed = {"steps": 30_000, "batch_size": 128, "lr": 1e-5, "alpha_ddpm": 1e-4}
    assert {name: getattr(tuning, name) for name in printed} == printed


# ---- presets ----


def test_presets_are_table_values_that_arguments_overrule():
    for name, (budget, experts) in {
        "coco-base": (0.78, 8),
        "coco-small": (0.64, 8),
        "cc3m-base": (0.85, 16),
        "cc3m-small": (0.66, 8),
    }.items():
        cfg = settings.read_with_preset(Pruning, ["--preset", name], None)
        assert (cfg.budget, cfg.num_experts) == (budget, experts) and cfg.target == name[:4]
    cfg = settings.read_with_preset(Pruning, ["--preset", "cc3m-base", "--budget", "0.5"], None)
    assert cfg.budget == 0.5 and cfg.num_experts == 16


def test_a_target_alone_brings_its_defaults():
    usual = replace(PAPER, depth="all")  # the paper's depth is for its presets
    assert settings.read_with_preset(Pruning, ["--target", "coco"], None) == usual
    own = settings.read_with_preset(Pruning, ["--target=my_pictures", "--lr", "0.02"], None)
    assert own == replace(usual, target="my_pictures", lr=0.02)
    assert settings.read_with_preset(Pruning, [], None) == EMOJI


def test_a_run_is_named_after_its_target_and_budget(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path / "pictures")
    for target, name in (("emoji", "emoji-0.5"), (".", "pictures-0.5"), ("../pictures/", None)):
        out = settings.resolve(replace(EMOJI, target=target, budget=0.5)).out
        assert out == settings.RUNS / (name or "pictures-0.5")

"""`--help` reads as documentation: one line an option, in groups, on two screens."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import pytest
import tyro

import settings
from common.options import help_text, read_options
from common.ranges import Choice

SCRIPTS = {  # module -> its configuration
    "train": settings.Pruning,
    "finetune": settings.Finetuning,
    "sample": None,
    "evaluate": None,
    "compare": None,
    "targets.__main__": None,
}


@dataclass(frozen=True)
class Small:
    """Adds numbers."""

    HEADINGS: ClassVar = {"words": "what", "rate": "how"}
    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Words."""
    count: int | None = None
    """Words,

    counted.
    """
    rate: float = 1e-4
    """Rate (paper: 1)."""
    mode: Annotated[str, Choice("fast", "slow")] = "fast"
    """Mode."""
    loud: bool = True
    """Loud."""


MODULE = "Sums: Sec. 9.\n\n    python sums.py one\n    python sums.py two\n\nMore.\n"


def test_the_whole_text(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sums.py"])
    monkeypatch.setitem(sys.modules, "__main__", sys)  # a script, not `python -m`
    monkeypatch.setattr(sys, "__spec__", None)
    assert help_text(Small, MODULE) == (
        "usage: python sums.py [options], each shown with its default\n\n"
        "Sums: Sec. 9.\n\nAdds numbers.\n\n"
        "what:\n"
        "  WORDS ...                  Words.\n"
        "  --count N                  Words, counted.\n\n"
        "how:\n"
        "  --rate X          0.0001   Rate (paper: 1).\n"
        "  --mode fast|slow  fast     Mode.\n"
        "  --[no-]loud       yes      Loud.\n\n"
        "examples:\n    python sums.py one\n    python sums.py two"
    )


def test_help_is_printed_and_ends(capsys):
    with pytest.raises(SystemExit) as stop:
        read_options(Small, MODULE, ["--rate", "2", "--help"])
    assert stop.value.code == 0 and "--[no-]loud" in capsys.readouterr().out


def test_options_are_read():
    assert read_options(Small, MODULE, ["a", "b", "--no-loud"]) == Small(("a", "b"), loud=False)
    assert read_options(Small, MODULE, [], Small(count=3)).count == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_of_every_script_is_explained_on_two_screens(name):
    module = importlib.import_module(name)
    config = SCRIPTS[name] or module.Config
    lines = help_text(config, module.__doc__).splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    shown = [match[1] for line in lines if (match := re.match(r"  (?:--(?:\[no-\])?)?(\S+)", line))]
    wanted = [field.name.replace("_", "-") for field in fields(config)]
    assert [option.lower() for option in shown if option.lower() in wanted] == wanted
    assert "examples:" in lines


def test_an_option_of_the_method_takes_one_line():
    for config in (settings.Pruning, settings.Finetuning):
        text = help_text(config, "").partition(":\n")[2]
        longer = [line for line in text.splitlines() if line.startswith(" " * 20)]
        assert len(longer) <= 2  # --teacher

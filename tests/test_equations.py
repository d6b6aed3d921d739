"""Every equation of the method is one function, and `docs/equations.md` holds it."""

import pytest

from common.errors import UserError
from docs.equations import ROOT as root
from docs.equations import Equation, definitions, equations, implementations

METHOD = [*range(1, 16), *range(20, 32)]


def test_every_equation_of_the_method_is_there_and_tagged_once():
    known = equations()
    assert list(known) == METHOD
    places = implementations(root, known)  # raises UserError for a tag too many or too few
    assert list(places) == METHOD
    assert {place.module for place in places.values()} == {
        *("losses", "router", "sinkhorn", "gates", "prune_unet")
    }


def test_definitions_start_where_they_say():
    for place in implementations(root, equations()).values():
        lines = (root / f"{place.module}.py").read_text().splitlines()
        code = lines[place.line - 1 :]
        definition = next(line for line in code if not line.strip().startswith("@"))
        assert definition.split("(")[0].split()[-1] == place.name.rpartition(".")[2]


MODULE = '''"""Header."""

LIMIT = 3


@decorated
class Router:
    """A router."""

    size: int = 1

    @property
    def route(self):
        """Chooses [Eq. 1] [Eq. 2]

        unlike [Eq. 3] and [Eq. 99]
        """
        return 1
'''


def known(*numbers):
    return {n: Equation(n, "title", "Sec. 1", "x") for n in numbers}


def test_a_module_is_taken_apart(tmp_path):
    (tmp_path / "router.py").write_text(MODULE)
    constants, router, route = definitions(tmp_path / "router.py")
    assert (constants.name, constants.code) == ("constants", "LIMIT = 3")
    assert (router.name, router.line) == ("Router", 6)
    assert router.code == "@decorated\nclass Router:\n\n    size: int = 1"
    assert (route.name, route.line, route.equations) == ("Router.route", 12, (1, 2))
    assert route.code == "@property\ndef route(self):\n    return 1"
    assert route.docstring.startswith("Chooses\n") and "unlike [Eq. 3]" in route.docstring


def test_tags_that_are_missing_double_or_unknown_are_refused(tmp_path):
    (tmp_path / "router.py").write_text(MODULE)
    assert list(implementations(tmp_path, known(1, 2))) == [1, 2]
    with pytest.raises(UserError, match=r"\[Eq. 3\].*nowhere"):
        implementations(tmp_path, known(1, 2, 3))
    with pytest.raises(UserError, match=r"\[Eq. 2\].*no equation"):
        implementations(tmp_path, known(1))
    (tmp_path / "other.py").write_text('def again():\n    """Once more [Eq. 1]"""\n')
    with pytest.raises(UserError, match=r"\[Eq. 1\].*other.py:1, router.py:12"):
        implementations(tmp_path, known(1, 2))

"""Every equation of the method is one function, and README's table of them is current."""

import sys

import pytest

from common.errors import UserError
from docs import equations as docs

METHOD = [*range(1, 16), *range(20, 25), *range(26, 32)]


def test_every_equation_of_the_method_is_tagged_once():
    places = docs.tagged(docs.ROOT)
    assert {number: len(places.get(number, [])) for number in METHOD} == dict.fromkeys(METHOD, 1)
    assert places.keys() - set(METHOD) <= {25}  # which repeats Eq. 15


def test_the_table_of_the_readme_is_current(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs.equations", "--check"])
    docs.main()


def test_links_lead_to_the_functions():
    for places in docs.tagged(docs.ROOT).values():
        for place in places:
            line = (docs.ROOT / place.module).read_text().splitlines()[place.line - 1]
            assert line.split("(")[0].split()[-1] == place.function.rpartition(".")[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with one module that tags two equations, and a README."""
    module = '''class Router:
    def route(self):
        """Chooses [Eq. 1] [Eq. 2]

        unlike [Eq. 3] and [Eq. 99]
        """
'''
    (tmp_path / "router.py").write_text(module)
    (tmp_path / "README.md").write_text(f"top\n{docs.START}\nold\n{docs.END}\nbottom\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "EQUATIONS", {1: "first", 2: "second"})
    return tmp_path


def run(monkeypatch, folder, *options):
    readme = str(folder / "README.md")
    monkeypatch.setattr(sys, "argv", ["docs.equations", "--readme", readme, *options])
    docs.main()
    return (folder / "README.md").read_text()


def test_the_table_is_written_between_the_markers_and_nowhere_else(project, monkeypatch):
    text = run(monkeypatch, project)
    assert text.startswith("top\n") and text.endswith("\nbottom\n") and "old" not in text
    assert "| 1 | first | [`router.Router.route`](router.py#L2) |" in text
    assert "| 2 | second | [`router.Router.route`](router.py#L2) |" in text
    assert run(monkeypatch, project) == text
    assert run(monkeypatch, project, "--check") == text


def test_check_changes_nothing_and_fails_on_a_stale_table(project, monkeypatch, capsys):
    before = (project / "README.md").read_text()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, project, "--check")
    assert stop.value.code == 1
    assert (project / "README.md").read_text() == before
    assert "make docs" in capsys.readouterr().out


def test_tags_that_are_missing_double_or_unknown_are_refused(project, monkeypatch):
    monkeypatch.setattr(docs, "EQUATIONS", {1: "first", 2: "second", 3: "third"})
    with pytest.raises(UserError, match=r"\[Eq. 3\].*nowhere"):
        docs.equation_table(project)
    monkeypatch.setattr(docs, "EQUATIONS", {1: "first"})
    with pytest.raises(UserError, match=r"\[Eq. 2\].*no equation"):
        docs.equation_table(project)
    (project / "other.py").write_text('def again():\n    """Once more [Eq. 1]"""\n')
    with pytest.raises(UserError, match=r"\[Eq. 1\].*other.py:1, router.py:2"):
        docs.equation_table(project)


def test_a_readme_without_markers_is_refused(project, monkeypatch):
    (project / "README.md").write_text(f"only {docs.START}")
    with pytest.raises(UserError, match="place for the table"):
        run(monkeypatch, project)
    (project / "README.md").unlink()
    with pytest.raises(UserError, match="does not exist"):
        run(monkeypatch, project)

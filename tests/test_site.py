"""The site: every equation beside its code, every link leads somewhere, nothing from elsewhere."""

import re
from html.parser import HTMLParser

import pytest

from common.errors import UserError
from docs import site
from docs.equations import ROOT, equations
from settings import Pruning, group

LOADING = ("img", "script", "link", "iframe", "source", "video", "object", "embed")


class Page(HTMLParser):
    """What a page links to, loads, and names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.math = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.math += tag == "math"
        if "id" in values:
            self.ids.append(values["id"])
        for name in ("href", "src", "data", "srcset"):
            if name in values:
                (self.loaded if tag in LOADING else self.links).append(values[name])
        if tag == "img":
            assert values.get("alt"), values


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    site.build(out)
    return {path: Page(path.read_text(encoding="utf-8")) for path in out.glob("*.html")}


def test_every_equation_is_shown_on_the_first_page_and_on_its_modules(pages):
    by_name = {path.name: page for path, page in pages.items()}
    first, numbers = by_name["index.html"], list(equations())
    assert [int(i[3:]) for i in first.ids if re.fullmatch(r"eq-\d+", i)] == numbers
    assert first.math == len(numbers)
    modules = [f"{name}.html" for name in site.METHOD]
    assert sum(by_name[name].math for name in modules) == len(numbers)


def test_an_equation_stands_beside_its_code(pages):
    text = next(path for path in pages if path.name == "sinkhorn.html").read_text()
    row = re.sub(r"<[^>]+>", "", text[text.index('id="sinkhorn"') :])
    assert row.index("Eq. 5:") < row.index("Eq. 7:") < row.index("def sinkhorn(")
    assert "log_Q = F.log_softmax(log_Q, dim=1)" in row and "&lt;&lt;" not in row


def test_comments_of_a_document_are_not_shown(pages):
    text = next(path for path in pages if path.name == "results.html").read_text()
    assert "<table>" in text and "&lt;!--" not in text


def test_every_link_leads_to_something(pages):
    for path, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), path.name
        for link in page.links + page.loaded:
            if re.match(r"[a-z]+:", link):
                continue
            name, _, fragment = link.partition("#")
            target = path.parent / name if name else path
            assert target.is_file(), (path.name, link)
            assert not fragment or fragment in pages[target].ids, (path.name, link)


def test_nothing_is_loaded_from_elsewhere(pages):
    for path, page in pages.items():
        assert not [url for url in page.loaded if re.match(r"(https?:)?//", url)], path.name
    folder = next(iter(pages)).parent
    for path in [folder / "style.css", *folder.rglob("*.svg")]:
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", path.read_text()), path.name


def test_a_link_to_nothing_is_refused(tmp_path):
    page = site.Site(tmp_path)
    with pytest.raises(UserError, match=r"docs/results.md links to \.\./nowhere.py"):
        page.prose("[x](../nowhere.py)", ROOT / "docs" / "results.md")
    assert "losses.html#eq" in page.prose("[x](../losses.py#eq)", ROOT / "docs" / "results.md")


def test_arguments_become_a_list():
    text = site.docstring_markdown(
        "Sum.\n\nArgs:\n    a, b: numbers,\n        real.\n    c: one.\n"
    )
    assert text == "Sum.\n\n**Args**\n\n- `a, b`: numbers,\n        real.\n- `c`: one.\n"


def test_every_switch_is_in_the_table_of_departures():
    text = (ROOT / "docs" / "departures.md").read_text(encoding="utf-8")
    flags = {re.sub(r"^(--)no-", r"\1", flag) for flag in re.findall(r"`(--[a-z-]+)", text)}
    assert {f"--{name.replace('_', '-')}" for name in group(Pruning, "hold_budget")} - {
        "--open-logit"
    } <= flags

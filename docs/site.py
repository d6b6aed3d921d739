"""The site: the paper's equations beside the code that implements them, and further pages.

    python -m docs.site                # writes docs/site/index.html and what it needs
    python -m docs.site --out D        # somewhere else

Nothing is loaded from elsewhere: equations are MathML, and every page can be read offline.
"""

from __future__ import annotations

import os
import re
import shutil
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2
import tyro
from markdown_it import MarkdownIt
from markupsafe import Markup
from math_core import LatexToMathML
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from common.errors import UserError, command_line
from docs.equations import ROOT, TAG, definitions, equations, implementations

METHOD = ["sinkhorn", "router", "gates", "prune_unet", "macs", "latency", "importance", "losses"]
METHOD += ["settings", "train", "refit", "finetune", "run", "sample", "evaluate", "compare"]
DOCUMENTS = {  # page -> its source; those that exist are shown
    "results": ROOT / "docs/results.md",
    "bench": ROOT / "docs/bench.md",
    "departures": ROOT / "docs/departures.md",
    "own_images": ROOT / "docs/own_images.md",
    "model_card": ROOT / "assets/pocket/README.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "notice": ROOT / "NOTICE.md",
}
COMMENT = re.compile(r"^<!--.*?-->$", re.MULTILINE)  # such as where a table is filled in
STYLES = {"light": "default", "dark": "github-dark"}  # of Pygments


def mathml(latex: str) -> Markup:
    """An equation as MathML, in a box of its own that scrolls."""
    inner = LatexToMathML().convert_with_local_state(latex, displaystyle=True)
    return Markup(f'<div class="math" tabindex="0">{inner}</div>')


def code(text: str, language: str) -> Markup:
    """A block of code that scrolls inside its own box."""
    inner = highlight(text, get_lexer_by_name(language or "text"), HtmlFormatter(nowrap=True))
    return Markup(f'<pre tabindex="0"><code>{inner}</code></pre>')


def slug(text: str) -> str:
    """`Sec. 3.2: Gates` -> `sec-3-2-gates`."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")


def docstring_markdown(text: str) -> str:
    """A docstring as Markdown: `Args:` and the like become a bold word and a list."""

    def section(match: re.Match[str]) -> str:
        items = re.sub(r"^    (?=\S)", "- ", match[2], flags=re.M)
        return f"**{match[1]}**\n\n" + re.sub(r"^- ([\w, ]+):", r"- `\1`:", items, flags=re.M)

    text = TAG.sub(r" Eq. \1", text)
    return re.sub(
        r"^(Args|Returns|Raises):\n((?:(?: {4}.*)?\n|    .+)+)", section, text, flags=re.M
    )


class Site:
    """Renders pages into a folder; files that they link to are copied there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.documents = {page: path for page, path in DOCUMENTS.items() if path.exists()}
        self.pages = {path: f"{page}.html" for page, path in self.documents.items()}
        self.pages |= {ROOT / f"{name}.py": f"{name}.html" for name in METHOD}
        self.markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        rules: dict[str, Any] = vars(self.markdown.renderer)["rules"]
        rules["fence"] = rules["code_block"] = lambda tokens, i, *_: code(
            tokens[i].content, tokens[i].info.strip()
        )
        rules["table_open"] = lambda *_: '<div class="table" tabindex="0"><table>'
        rules["table_close"] = lambda *_: "</table></div>"
        folder = jinja2.FileSystemLoader(ROOT / "docs")
        jinja = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True)
        jinja.globals |= {"prose": self.prose, "code": code, "mathml": mathml, "slug": slug}
        self.template = jinja.get_template("page.html")

    def prose(self, text: str, source: Path = ROOT / "README.md") -> Markup:
        """Markdown as HTML; links are relative to the folder of `source`."""
        tokens = self.markdown.parse(docstring_markdown(text))
        for token, following in pairwise(tokens):
            if token.type == "heading_open":
                token.attrSet("id", slug(following.content))
            for child in token.children or []:
                for name in {"href", "src"} & child.attrs.keys():
                    child.attrSet(name, self.link(str(child.attrs[name]), source))
        return Markup(self.markdown.renderer.render(tokens, self.markdown.options, {}))

    def link(self, target: str, source: Path) -> str:
        """Where a link of `source` leads on the site. Raises `UserError` where to nothing."""
        if re.match(r"[a-z]+:|#", target):
            return target
        name, mark, fragment = target.partition("#")
        path = Path(os.path.normpath(source.parent / name))
        if path in self.pages:
            return self.pages[path] + mark + fragment
        if not path.is_file():
            raise UserError(f"{source.relative_to(ROOT)} links to {target}, which is no file")
        copy = self.out / "files" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        return copy.relative_to(self.out).as_posix()

    def write(self, page: str, title: str, **content: Any) -> None:
        """Write a page, `page`.html, of what its template asks for."""
        around = {"page": page, "title": title, "method": METHOD, "documents": self.documents}
        html = self.template.render(**around, **content)
        (self.out / f"{page}.html").write_text(html, encoding="utf-8")


def build(out: Path = ROOT / "docs" / "site") -> None:
    """Build the site. Raises `UserError` for a tag or a link that is wrong.

    Args:
        out: Folder that the site is written to; what it held is removed.
    """
    known = equations()
    places = implementations(ROOT, known)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    site, sections = Site(out), []
    for section, numbers in groupby(places, lambda number: known[number].section):
        rows = [(place, list(of_it)) for place, of_it in groupby(numbers, lambda n: places[n])]
        sections.append((section, rows))
    site.write("index", "APTP beside its paper", sections=sections, known=known)
    for name in METHOD:
        source = ROOT / f"{name}.py"
        header = source.read_text(encoding="utf-8").split('"""')[1]
        found = sorted(definitions(source), key=lambda d: (min(d.equations, default=99), d.line))
        site.write(name, f"{name}.py", header=header, definitions=found, known=known)
    for page, source in site.documents.items():
        text = COMMENT.sub("", source.read_text(encoding="utf-8"))
        site.write(page, page.replace("_", " "), text=text, source=source)
    shutil.copyfile(ROOT / "docs" / "method.svg", out / "method.svg")
    style = (ROOT / "docs" / "style.css").read_text(encoding="utf-8")
    for scheme, name in STYLES.items():
        rules = HtmlFormatter(style=name).get_style_defs("pre")
        style += f"@media (prefers-color-scheme: {scheme}) {{\n{rules}\n}}\n"
    (out / "style.css").write_text(style, encoding="utf-8")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(build))

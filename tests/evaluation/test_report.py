"""Figures against brute force, the page against an HTML parser, both on data of any kind."""

import base64
import dataclasses
import io
import math
import re
import statistics
import unicodedata
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from common.errors import UserError
from common.files import MetricsLog, write_json
from evaluation import analysis, figures, grids, report
from evaluation.analysis import Routed
from evaluation.generated import Example
from evaluation.report import Inputs

HOSTILE = (
    "<script>alert('1')</script>",
    '"><img src=http://example.org/x.png onerror=alert(2)>',
    "$x^2$ costs $5 & \\frac{1}{$ \\$",
    "null \0, bell \a, half a pair \ud83d, \u202eright to left, new\nline",
    "<!-- ]]> --> &lt;b&gt; 日本語 😀",
    "word " * 2000,
    "w" * 10_000,
    "",
    "   ",
)


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure, (H, W, 3)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=50)
    return np.asarray(Image.open(buffer).convert("RGB"))


KINDS = ("resnets", "attentions")

COLUMNS = ("loss", *figures.CURVES)  # of metrics.csv

BLOCKS = [
    *(f"down_blocks.{i}.{kind}.{k}" for i in (0, 1) for k in (0, 1) for kind in KINDS),
    *("mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0"),
]


def write_run(run: Path, num_experts: int, rows: int) -> None:
    """What the report reads of a run that `train.py` finished."""
    write_json(run / "config.json", {"warmup_steps": 2, "joint_steps": 30})
    log = MetricsLog(run / "metrics.csv", list(COLUMNS), 0)
    for step in range(32):
        log.write(step, {name: 1 / (step + k + 1) for k, name in enumerate(COLUMNS)})
    log.close()
    write_json(run / "assignments.json", {"train": [i % num_experts for i in range(rows)]})
    ratio = {"macs_ratio": 0.5}
    write_json(run / "summary.json", {"experts": [ratio for _ in range(num_experts)]})


def inputs_of(num_experts: int, captions, groups) -> Inputs:
    """Inputs with prompts for all experts but the last, where there is more than one."""
    generator = np.random.default_rng(num_experts)
    kept = generator.integers(0, 9, (len(BLOCKS), num_experts)) / 8  # 0 and 1 among them
    used = max(1, num_experts - 1)
    experts = [i % used for i in range(len(captions))]
    half = len(captions) // 2
    image = Image.new("RGB", (64, 48), "red")
    samples = [Example(c, i, 0.5 + i / 99, image) for c, i in zip(captions, experts, strict=True)]
    batch = list(range(len(captions)))[::-2]
    return Inputs(
        {"target": "emoji", "teacher": "pocket", "budget": 0.7, "macs_ratio_mean": 0.69},
        Routed(captions, groups, experts),
        Routed(captions[:half], groups[:half], experts[:half]),
        generator.uniform(0.4, 1, num_experts).tolist(),
        1_234_000_000,
        BLOCKS,
        kept,
        (batch, [row % num_experts for row in batch]) if num_experts > 1 else None,
        {"rows": [{"method": "<b>aptp</b>", "images": 3, "frechet": math.nan, "r1": None}]},
        samples=[sample._replace(teacher=image.rotate(90)) for sample in samples],
        same_prompt=samples,
    )


# ---- analysis ----


@given(st.data())
def test_group_costs_against_a_loop(data):
    ratios = data.draw(st.lists(st.floats(0.3, 1), min_size=1, max_size=4))
    pairs = st.tuples(st.sampled_from(["", "a", "b", "<c>"]), st.integers(0, len(ratios) - 1))
    rows = data.draw(st.lists(pairs, max_size=20))
    found = analysis.group_costs(
        Routed([""] * len(rows), [g for g, _ in rows], [i for _, i in rows]), ratios
    )
    assert {row.group for row in found} == {group for group, _ in rows}
    assert [row.mean for row in found] == sorted((row.mean for row in found), reverse=True)
    for row in found:
        own = [ratios[i] for group, i in rows if group == row.group]
        assert row.prompts == len(own)
        assert row.mean == pytest.approx(statistics.mean(own))
        if len(own) == 1:
            assert math.isnan(row.error)
        else:
            error = statistics.stdev(own) / math.sqrt(len(own))
            assert row.error == pytest.approx(error, abs=1e-9)


WORDS = st.sampled_from(["cat", "dog", "Red", "emoji", "the", "an", "of", "flag", "x1", "it's"])
LINES = st.lists(st.lists(WORDS, max_size=6).map(" ".join), max_size=12)


@example(["cat"], ["dog"])  # exactly twice as common is not more
@given(LINES, LINES)
def test_frequent_words_against_a_loop(own, others):
    everything = others + own
    lower = [
        set("".join(c if c in "abcdefghijklmnopqrstuvwxyz" else " " for c in line.lower()).split())
        for line in everything
    ]
    mine = lower[len(others) :]
    scores = {}
    for word in set().union(*lower) if lower else ():
        here = sum(word in line for line in mine)
        everywhere = sum(word in line for line in lower)
        if len(word) >= 3 and here * len(lower) > 2 * everywhere * len(mine):
            scores[word] = here
    expected = sorted(scores, key=lambda word: (-scores[word], word))
    expected = [word for word in expected if word not in ENGLISH_STOP_WORDS]
    assert analysis.frequent_words(own, everything) == expected[:6]
    assert analysis.frequent_words(own, everything, 1) == expected[:1]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Жираф и собака", {"жираф", "собака"}),
        ("ένα ΚΌΚΚΙΝΟ σκυλί", {"ένα", "κόκκινο", "σκυλί"}),
        ("crème brûlée à la française", {"crème", "brûlée", "française"}),
        ("Stra\u00dfe, Ma\u00df; \u00fcber_uns", {"straße", "maß", "über", "uns"}),
        (unicodedata.normalize("NFD", "crème brûlée"), {"crème", "brûlée"}),  # accents apart
        ("लाल रंग का जिराफ़", {"जिराफ़"}),  # vowel signs belong to their letters
        ("แมวสีแดง 1234", {"แมวสีแดง"}),
        ("赤い犬の写真", {"赤い犬の写真"}),
        ("it's 3d x2", set()),
    ],
)
def test_words_of_any_script_are_counted_whole(caption, words):
    found = analysis.frequent_words([caption], [caption, *["-"] * 2])
    assert set(found) == {unicodedata.normalize("NFC", word) for word in words}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_shares_and_perplexity(experts):
    share = analysis.shares(experts, 6)
    assert share.tolist() == [experts.count(i) / len(experts) for i in range(6)]
    entropy = -sum(p * math.log(p) for p in share if p)
    assert analysis.perplexity(share) == pytest.approx(math.exp(entropy))
    assert analysis.perplexity(np.full(7, 1 / 7)) == pytest.approx(7)
    assert analysis.shares([], 3).tolist() == [0, 0, 0]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.sampled_from([0, 1, 3, 7]))
def test_running_mean_against_a_loop(values, window):
    found = figures.running_mean(np.array(values), window)
    half = min(window, len(values)) // 2
    if window > len(values):  # an even width has no middle
        assert len(found) == len(values)
        return
    for k, value in enumerate(found):
        around = values[max(0, k - half) : k + half + 1]
        assert value == pytest.approx(statistics.mean(around), abs=1e-9)


@given(
    st.text("ab1 -$\\\n\0\ud83d\u202eé語", max_size=60) | st.sampled_from(HOSTILE),
    st.integers(2, 20),
    st.integers(1, 4),
)
def test_labels_are_short_and_plain(text, width, lines):
    found = grids.label(text, width, lines).replace(r"\$", "$").split("\n")
    assert len(found) <= lines and all(len(line) <= width for line in found)
    assert all(line.isprintable() for line in found)
    assert len(analysis.shorten(text, width)) <= width
    assert analysis.shorten("a  giraffe\n", 20) == "a giraffe"


def test_words_table_by_hand():
    train = Routed(["a cat", "a cat", "a dog", "a dog", "an owl"], [""] * 5, [2, 2, 0, 0, 0])
    rows = analysis.words_table(train, Routed(["a cat"], [""], [2]), [0.9, 0.8, 0.7])
    assert [row["expert"] for row in rows] == [2, 1, 0]
    assert [row["MACs ratio"] for row in rows] == ["0.700", "0.800", "0.900"]
    assert [row["of training"] for row in rows] == ["40.0%", "0.0%", "60.0%"]
    assert [row["of validation"] for row in rows] == ["100.0%", "0.0%", "0.0%"]
    assert [row["frequent words"] for row in rows] == ["cat", "", ""]  # dog: 2/3 < 2 x 2/5
    assert [row["two of its prompts"] for row in rows] == ["a cat", "", "a dog / an owl"]


def test_a_log_is_read_and_a_bad_one_refused(tmp_path):
    write_run(tmp_path, 2, 4)
    log = analysis.read_log(tmp_path / "metrics.csv")
    assert list(log) == ["step", *COLUMNS] and log["step"].tolist() == list(range(32))
    assert log["denoising"][3] == pytest.approx(1 / (4 + COLUMNS.index("denoising")))
    for text in (None, "", "step,loss\n", "step,loss\n0,spoilt\n", "step,loss\n0\n"):
        (tmp_path / "metrics.csv").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "metrics.csv").write_text(text)
        with pytest.raises(UserError, match=r"metrics\.csv is missing, empty or damaged"):
            analysis.read_log(tmp_path / "metrics.csv")


# ---- figures ----


def test_share_bars_show_the_shares_in_the_order_of_macs():
    ax = figures.share_bars([0, 0, 0, 2], [2, 2], [0.9, 0.7, 0.8]).axes[0]
    assert [bar.get_height() for bar in ax.patches[:3]] == [0, 0.25, 0.75]  # experts 1, 2, 0
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "1\n0.700",
        "2\n0.800",
        "0\n0.900",
    ]
    marks = next(line for line in ax.lines if line.get_marker() == "D")
    assert marks.get_ydata().tolist() == [0, 1, 0]
    darkness = [sum(bar.get_facecolor()[:3]) for bar in ax.patches[:3]]
    assert darkness == sorted(darkness, reverse=True)


def test_assignment_map_has_a_square_a_prompt():
    experts = [0, 1, 2, 0, 1]
    fig = figures.assignment_map([("one", experts, [0.5, 0.6, 0.7]), ("two", [1] * 5, [0.4, 0.9])])
    first, second = (ax.collections[0] for ax in fig.axes[:2])
    expected = [0.5, 0.6, 0.7, 0.5, 0.6]
    assert first.get_array().compressed().tolist() == expected
    assert first.get_array().shape == (2, 3)
    assert second.get_array().compressed().tolist() == [0.9] * 5
    assert first.norm.vmin == second.norm.vmin == 0.4 and first.norm.vmax == 0.9
    assert [text.get_text() for text in fig.axes[0].texts] == [str(i) for i in experts]
    assert "3 of 3 experts" in fig.axes[0].get_title()
    assert "1 of 2 experts" in fig.axes[1].get_title()


def test_heat_map_has_the_experts_in_the_order_of_macs():
    kept = np.array([[0.0, 0.25], [1.0, 0.5]])
    ax = figures.retained_heatmap(
        ["down_blocks.0.resnets.0", "mid_block.attentions.0"], kept, [0.9, 0.5]
    ).axes[0]
    assert ax.images[0].get_array().tolist() == [[0.25, 0.0], [0.5, 1.0]]
    assert [text.get_text() for text in ax.texts] == ["0.25", "0", "0.50", "1"]
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["down 0 ResBlock 0", "middle Attention 0"]


def test_difficulty_draws_means_intervals_and_overall_means():
    routed = Routed([""] * 5, ["a", "a", "b", "b", "c"], [0, 1, 1, 1, 0])
    ax = figures.difficulty({"training": routed}, [0.6, 0.8]).axes[0]
    points, _, bars = ax.containers[0]
    assert points.get_xdata() == pytest.approx([0.8, 0.7, 0.6])
    half = 1.96 * statistics.stdev([0.6, 0.8]) / math.sqrt(2)
    spans = [segment[:, 0].tolist() for segment in bars[0].get_segments()]
    assert spans[1] == pytest.approx([0.7 - half, 0.7 + half])
    assert spans[2] == pytest.approx([0.6, 0.6])  # a single prompt has no interval
    assert ax.lines[-1].get_xdata() == pytest.approx([0.72, 0.72])
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == ["b  (2)", "a  (2)", "c  (1)"]
    few = figures.difficulty({"training": routed}, [0.6, 0.8], most=2).axes[0]
    assert [tick.get_text() for tick in few.get_yticklabels()] == ["b  (2)", "a  (2)"]


def curves(steps: int) -> dict[str, np.ndarray]:
    return {"step": np.arange(steps)} | {name: np.linspace(1, 0, steps) for name in COLUMNS}


def test_loss_curves_mark_the_phases_and_leave_perplexity_out_of_the_warm_up():
    logs = {"with": curves(40), "without": curves(60)}
    fig = figures.loss_curves(logs, warmup_steps=10, budget=0.7, num_experts=4)
    assert [ax.get_title() for ax in fig.axes] == list(figures.CURVES.values())
    for ax in fig.axes:
        assert ax.patches[0].get_x() == 0 and ax.patches[0].get_width() == 10
        ends = [line.get_xdata()[-1] for line in ax.lines if len(line.get_xdata()) > 2]
        assert max(ends) == 59 and 39 in ends
    starts = [line.get_xdata()[0] for line in fig.axes[-1].lines if len(line.get_xdata()) > 2]
    assert set(starts) == {10}
    resource = [line for line in fig.axes[0].lines if line.get_xdata()[0] == 10]
    assert resource[0].get_ydata().tolist() == np.linspace(1, 0, 40)[10:].tolist()


def image(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def test_grids_show_each_image_at_its_place():
    samples = [
        Example("p", 1, 0.8, image("red"), image("blue")),
        Example("q", 0, 0.5, image("lime"), image("black")),
        Example("r", 1, 0.8, image("cyan")),
    ]

    def shown(fig: Figure) -> list[list[tuple[int, ...]]]:
        rows: dict[float, list] = {}
        for shown_image in fig.axes[0].images:
            left, _, _, top = shown_image.get_extent()
            rows.setdefault(top, []).append(
                (left, tuple(np.asarray(shown_image.get_array())[80, 80].tolist()))
            )
        return [[colour for _, colour in sorted(row)] for _, row in sorted(rows.items())]

    red, blue, lime = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    black, cyan, white = (0, 0, 0), (0, 255, 255), (255, 255, 255)
    grid = figures.sample_grid(samples)
    assert shown(grid) == [[lime, black], [red, blue, cyan]]
    words = [text.get_text() for text in grid.axes[0].texts]
    assert words.index("expert 0\n0.500 of the MACs") < words.index("expert 1\n0.800 of the MACs")
    assert words.count("teacher") == 2 and {"p", "q", "r"} <= set(words)
    assert shown(figures.sample_grid(samples, images=2)) == [[lime, black], [red, blue]]
    every = figures.through_every_expert([*samples, Example("p", 0, 0.5, image("lime"))])
    assert shown(every) == [[lime, red, blue], [lime, white, black], [white, cyan, white]]
    alone = figures.sample_grid([sample._replace(teacher=None) for sample in samples])
    assert shown(alone) == [[lime], [red, cyan]]
    assert "teacher" not in [text.get_text() for text in alone.axes[0].texts]
    named, nameless = ([samples[1]._replace(prompt=prompt)] for prompt in ("q", " "))
    assert (render(figures.sample_grid(named)) != render(figures.sample_grid(nameless))).any()


@pytest.mark.parametrize("num_experts", [1, 16])
def test_every_figure_runs_on_odd_inputs(num_experts):
    inputs = inputs_of(num_experts, HOSTILE, HOSTILE[::-1])
    nobody, ratios, equal = Routed([], [], []), inputs.ratios, [0.5] * num_experts
    batch = np.random.default_rng(0).integers(num_experts, size=300).tolist()
    log = curves(1)
    odd = [
        figures.loss_curves({"a": log}, warmup_steps=num_experts % 2, budget=1, num_experts=1),
        figures.assignment_map([("a", batch, ratios), ("b", [0], ratios), ("c", [], equal)]),
        figures.share_bars(inputs.train.experts, [], ratios),
        figures.share_bars([], [], equal),
        figures.retained_heatmap(inputs.blocks, inputs.kept, ratios),
        figures.difficulty({"training": inputs.train, "validation": nobody}, ratios),
        figures.difficulty({"training": nobody, "validation": inputs.train}, equal),
        figures.difficulty({"training": Routed(HOSTILE, [""] * 9, [0] * 9)}, ratios),
        figures.sample_grid(inputs.samples),
        figures.sample_grid([]),
        figures.through_every_expert(inputs.same_prompt),
        figures.through_every_expert([]),
    ]
    for fig in odd:
        pixels = render(fig)
        assert max(pixels.shape) < 3000
    for row in analysis.words_table(inputs.train, nobody, ratios):
        assert len(str(row["two of its prompts"])) < 130
        assert len(row["frequent words"]) < 200


# ---- page ----

EVERY = ("difficulty", "shares", "retained")  # figures of any run
TAGS = set(
    re.findall(
        r"\w+",
        """html head meta title link style body header h1 h2 p i b nav ul li a
    main section figure div img figcaption small table tr th td code details summary""",
    )
)


class Page(HTMLParser):
    """Checks nesting while it reads; keeps text, tags with their attributes, and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        self.words.append(data)

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Inputs]:
    """A run of 3 experts whose captions, groups, names and scores are hostile, and its report."""
    run = tmp_path_factory.mktemp("runs") / "a run"
    inputs = inputs_of(3, [*HOSTILE, "a cat"], [*HOSTILE[::-1], "cats"])
    summary = inputs.summary | {"method": HOSTILE[0], "target": HOSTILE[1], "teacher": HOSTILE[3]}
    inputs = dataclasses.replace(inputs, summary=summary)
    write_run(run, 3, len(inputs.train.captions))
    assert report.write_report(run, inputs) == run / "report" / "report.html"
    return run, inputs


def test_page_is_well_formed_and_loads_nothing(written):
    run, _ = written
    text = (run / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= TAGS  # so no script, frame, form or video
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            target = attributes.get(name) or ""
            assert target.startswith(("data:", "#")) or not target, target[:80]
    assert len(page.every("style")) == 1 and "url(" not in text and "@import" not in text
    policy = page.every("meta")[-1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    targets = {f"#{attributes['id']}" for attributes in page.every("section")}
    assert {attributes["href"] for attributes in page.every("a")} == targets
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_page_holds_the_figures_that_lie_beside_it(written):
    run, _ = written
    page = Page((run / "report" / "report.html").read_text(encoding="utf-8"))
    inside = [
        base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
        for image in page.every("img")
    ]
    beside = {path.name: path.read_bytes() for path in (run / "report").glob("*.png")}
    assert set(beside) == {
        f"{name}.png"
        for name in (*EVERY, "samples", "through-every-expert", "assignment", "losses")
    }
    assert sorted(inside) == sorted(beside.values())
    for image in page.every("img"):
        assert 5 < len(image["alt"] or "") <= 600
    captions = "".join(page.words)
    for name in beside:
        assert f"({name})" in captions
    for paper in ("Tables 2 and 4", "Fig. 8", "Fig. 9", "Fig. 10", "Figs. 11 and 12"):
        assert f"As {paper}" in captions
    assert not [path for path in (run / "report").iterdir() if path.name.startswith(".")]


def test_page_shows_data_as_text(written):
    run, inputs = written
    page = Page((run / "report" / "report.html").read_text(encoding="utf-8"))
    title = f"{HOSTILE[0]} on {HOSTILE[1]} at 0.7 of the MACs"
    assert "".join(page.words).count(title) == 2  # of the window, and on top
    scores, words, groups, blocks = page.tables
    assert scores[0] == ["method", "images", "Fréchet ↓", "R@1 ↑"]
    assert scores[1] == ["<b>aptp</b>", "3", "\N{EN DASH}", "\N{EN DASH}"]
    ratios = inputs.ratios
    assert [float(row[1]) for row in words[1:]] == pytest.approx(sorted(ratios), abs=5e-4)
    column = [row[0] for row in groups[1:]]
    assert HOSTILE[0] in column and "(no group)" in column
    assert sum(int(row[1]) for row in groups[1:]) == len(inputs.train.captions)
    order = analysis.expert_order(ratios)
    assert blocks[0] == ["block", *(f"expert {i}" for i in order)]
    assert [row[0] for row in blocks[1:]] == [figures.block_label(name) for name in BLOCKS]
    for row, shares in zip(blocks[1:], inputs.kept, strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(
            shares[order].tolist(), abs=0.0051
        )
    assert max(len(line) for table in page.tables for row in table for line in row) < 200


def test_a_run_of_one_untrained_expert_has_a_report_too(tmp_path):
    """What a baseline leaves: no log, one code, and no image was generated."""
    inputs = inputs_of(1, ["a cat", "a dog"], ["", ""])
    inputs = dataclasses.replace(inputs, samples=(), same_prompt=(), metrics={})
    write_json(tmp_path / "config.json", {})
    path = report.write_report(tmp_path, inputs)
    assert {file.stem for file in path.parent.glob("*.png")} == set(EVERY)
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.every("section")) == len(page.every("h2")) == 4
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    report.write_report(tmp_path, inputs)  # the same inputs give the same files
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_the_run_to_compare_with_is_shown_or_refused(written, tmp_path):
    run, inputs = written
    alone = Page((run / "report" / "report.html").read_text(encoding="utf-8"))
    assert "".join(alone.words).count("No run without transport was given") == 2
    own, other, rows = tmp_path / "own", tmp_path / "other", len(inputs.train.captions)
    write_run(own, 3, rows)
    write_run(other, 5, rows)
    both = dataclasses.replace(inputs, without_transport=other)
    page = Page(report.write_report(own, both).read_text(encoding="utf-8"))
    words = "".join(page.words)
    assert "No run without" not in words
    batch, transported = inputs.batch
    same = sum(inputs.train.experts[row] == i for row, i in zip(batch, transported, strict=True))
    assert f"{same} of the {len(batch)} prompts get the same expert both ways." in words
    used = len({row % 5 for row in batch})
    (alt,) = (image["alt"] for image in page.every("img") if "by transport" in image["alt"])
    assert f"trained without transport: {used} of 5 experts" in alt
    write_run(other, 5, 4)
    with pytest.raises(UserError, match="has 4 training prompts"):
        report.write_report(own, both)
    write_run(other, 5, rows)
    (other / "metrics.csv").unlink()
    with pytest.raises(UserError, match="is missing"):
        report.write_report(own, both)


def test_a_budget_of_time_is_told_expert_by_expert(tmp_path):
    """What was predicted and what was measured, in milliseconds; nothing of it for MACs."""
    inputs = inputs_of(2, ["a cat", "a dog", "a flag"], ["x", "y", "x"])
    write_run(tmp_path, 2, 3)
    page = report.write_report(tmp_path, inputs).read_text(encoding="utf-8")
    assert "The budget is one of time" not in page
    times = [(0.55, 0.0115, 0.011), (0.45, 0.009, None)]
    experts = [
        {
            "id": i,
            "macs_ratio": 0.5,
            "latency_ratio": ratio,
            "latency_predicted": predicted,
            "latency_measured": measured,
        }
        for i, (ratio, predicted, measured) in enumerate(times)
    ]
    place = {"device": "NVIDIA X", "precision": "fp16", "batch": 2, "pixels": 768}
    latency = {"dense": 0.02, "runtime": "graph"} | place
    summary = inputs.summary | {
        "experts": experts,
        "latency": latency,
        "latency_ratio_mean": 0.512,
    }
    timed = dataclasses.replace(inputs, summary=summary)
    page = Page(report.write_report(tmp_path, timed).read_text(encoding="utf-8"))
    words = " ".join("".join(page.words).split())
    assert "".join(page.words).count("at 0.7 of the latency") == 2
    assert "0.5120 (budget 0.7, measured), of 20 ms a forward on NVIDIA X, fp16, batch 2" in words
    cells = report.latency_table(summary).cells
    assert cells[0][2:] == ["0.550", "11.5", "11", "+4.5%"]
    assert cells[1][3:] == ["9", "\N{EN DASH}", "not measured"]


def test_a_table_shows_values_as_people_write_them():
    rows = [{"n": 12345, "x": 0.5, "ok": True}, {"x": 1e-5, "ok": False, "name": "a & b"}]
    table, dash = report.table(rows), "\N{EN DASH}"
    assert table.columns == [("n", "number"), ("x", "number"), ("ok", "number"), ("name", "text")]
    assert table.cells == [["12,345", "0.500", "yes", dash], [dash, "1e-05", "no", "a & b"]]

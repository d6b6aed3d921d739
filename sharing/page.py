"""A page to try a model on: type a prompt and see which expert makes its image, and why.

    python -m sharing.page --run runs/emoji-0.5
    python -m sharing.page --folder my_model    # one that sharing.publish made

It is for this machine alone, loads nothing from elsewhere and tells nobody, unless `--share` asks
Gradio for a public link. What a published folder does not hold is left out: the teacher's image and
the training prompts.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tabulate import tabulate

from common.errors import UserError, command_line
from common.files import one_line, read_json
from common.options import read_options
from common.processes import pick_device
from common.ranges import Range, check
from evaluation.tables import budget_text, latency_line
from run import load_split, newest_run, read_run
from sample import APTPPipeline, check_prompt
from settings import Precision
from sharing.card import expert_cells, published_summary
from sharing.publish import STEPS
from teacher.model import PRECISIONS

NEAREST, SIDE = 5, 256  # prompts that are shown; pixels that an image has at least
DAY = (86400, 86400)  # how often, and from which age on, images that were shown are deleted
CSS = """
.scroll { overflow-x: auto }
.scroll * { overflow-wrap: normal; word-break: normal }
.wide th, .wide td { white-space: nowrap }
.scroll th, .scroll td { border: 1px solid var(--border-color-primary) !important }
.thumbnail-item { display: flex; flex-direction: column }
.thumbnail-item img { flex: 1; min-height: 0 }
.caption-label { position: static !important; max-width: none !important; white-space: normal }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important }
@media (min-width: 600px) { .grid-container { grid-template-columns: repeat(4, 1fr) !important } }
"""


@dataclass(frozen=True)
class Config:
    """A page to try a run, or a published folder, on."""

    HEADINGS: ClassVar = {"run": "what is shown", "port": "how"}
    run: Path | None = None
    """Run folder; the newest run if neither is given."""
    folder: Path | None = None
    """A published folder instead; the Python files in it are run."""
    teacher: str | None = None
    """Where the run's teacher is now, if it was moved."""
    prompt_encoder: str | None = None
    """Where the run's prompt encoder is now, if it was moved."""
    data_dir: Path | None = None
    """Where the run's training data is now, if it was moved."""
    port: Annotated[int, Range(1, 65535)] | None = None
    """The first free one from 7860 on if not given."""
    share: bool = False
    """A public link too, by Gradio's servers."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "fp32"
    """Of all weights."""


class Settings(NamedTuple):
    """How an image is generated."""

    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True)
class Shown:
    """What the page asks of a run or of a published folder. Experts are numbers, -1 the teacher."""

    summary: dict[str, Any]  # of `published_summary`
    route: Callable[[str], int]
    sample: Callable[[str, int, Settings], tuple[Image.Image, float]]  # the image, and its seconds
    nearest: Callable[[str], list[tuple[str, int]]] | None  # training prompts, with their experts
    has_teacher: bool
    samples: Path | None  # a picture of images of all experts

    @property
    def experts(self) -> dict[int, dict[str, Any]]:
        """What the summary says of each expert."""
        return {row["id"]: row for row in self.summary["experts"]}

    @property
    def columns(self) -> dict[str, str]:
        """Whose images stand side by side, and what is written over them."""
        columns = {"expert": "The prompt's expert"}
        columns |= {"teacher": "The teacher"} if self.has_teacher else {}
        return columns | ({"wrong": "A wrong expert"} if len(self.experts) > 1 else {})


# ---- what is shown ----


def shown_run(cfg: Config) -> Shown:
    """A run. Raises `UserError` where it is incomplete, or what it names is not there."""
    run = cfg.run or newest_run()
    names = ("summary.json", "config.json", "assignments.json")
    summary, settings, assigned = read_run(run, *names)
    where: dict[str, Any] = {"teacher": cfg.teacher, "prompt_encoder": cfg.prompt_encoder}
    pipeline = APTPPipeline.from_pretrained(run, cfg.device, precision=cfg.precision, **where)

    def sample(prompt: str, expert: int, how: Settings) -> tuple[Image.Image, float]:
        options: dict[str, Any] = {
            "num_inference_steps": how.steps,
            "guidance_scale": how.guidance,
        }
        made = pipeline([prompt], seeds=[how.seed], expert=expert, **options)
        return made.images[0], made.seconds

    nearest = None
    try:
        size = pipeline.teacher.resolution
        captions = load_split(run, settings, assigned, "train", size, cfg.data_dir).captions
        nearest = partial(nearest_prompts, pipeline, captions, assigned["train"])
    except UserError as error:
        print(f"without training prompts: {error}")
    grid = run / "report" / "samples.png"
    return Shown(
        summary=published_summary(summary, pipeline),
        route=lambda prompt: pipeline.route([prompt])[0],
        sample=sample,
        nearest=nearest,
        has_teacher=True,
        samples=grid if grid.exists() else None,
    )


def nearest_prompts(
    pipeline: APTPPipeline, captions: list[str], experts: list[int], prompt: str
) -> list[tuple[str, int]]:
    """The training prompts whose embeddings are most like a prompt's, and their experts."""
    z = pipeline.encoder.embeddings(captions)  # (rows, dz)
    likeness = z @ pipeline.encoder([prompt])[0]  # (rows,)
    best = likeness.topk(min(len(captions), 10 * NEAREST)).indices.tolist()
    return list({captions[row]: experts[row] for row in best}.items())[:NEAREST]


def shown_folder(cfg: Config, folder: Path) -> Shown:
    """A published folder. Raises `UserError` where it is none, or damaged."""
    if not (folder / "model_index.json").exists() or not (folder / "summary.json").exists():
        raise UserError(
            f"--folder {folder} is not published; `python -m sharing.publish` makes one"
        )
    summary = read_json(folder / "summary.json")
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # the libraries raise all kinds over a damaged file
        why = " ".join(str(error).split())[:120]
        raise UserError(f"--folder {folder} is damaged ({why}); publish the run again") from None
    pipe.to(pick_device(cfg.device), PRECISIONS[cfg.precision]).set_progress_bar_config(
        disable=True
    )
    routed = hasattr(pipe, "route")

    def sample(prompt: str, expert: int, how: Settings) -> tuple[Image.Image, float]:
        own, clock = {"experts": expert} if routed else {}, time.time()
        options = {"num_inference_steps": how.steps, "guidance_scale": how.guidance} | own
        made = pipe(prompt, generator=torch.Generator().manual_seed(how.seed), **options)
        return made.images[0], time.time() - clock

    only, grid = summary["experts"][0]["id"], folder / "samples.webp"
    return Shown(
        summary=summary,
        route=lambda prompt: pipe.route([prompt])[0] if routed else only,
        sample=sample,
        nearest=None,
        has_teacher=False,
        samples=grid if grid.exists() else None,
    )


def load(cfg: Config) -> Shown:
    """What `cfg` asks for. Raises `UserError` for what the user can mend."""
    check(cfg)
    if cfg.folder is None:
        return shown_run(cfg)
    for name in ("run", "teacher", "prompt_encoder", "data_dir"):
        if getattr(cfg, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} does not go with --folder; leave one out")
    return shown_folder(cfg, cfg.folder)


# ---- the page ----


def as_html(rows: Any, heads: Any = (), kind: str = "") -> str:
    """A table, which scrolls where it is too wide; of the kind `wide`, it is so on a phone."""
    table = tabulate(rows, heads, "html", disable_numparse=True)
    return f'<div class="scroll {kind}">{table}</div>'


def about_model(model: Shown) -> str:
    """The page's first lines."""
    summary, experts = model.summary, model.experts
    count = f"{len(experts)} experts" if len(experts) > 1 else f"expert {min(experts)}"
    line = f"## {html.escape(Path(summary['teacher']).name)} at {budget_text(summary)}\n"
    return f"{line}{count}, pruned on {html.escape(str(Path(summary['target']).name))}."


def about_expert(model: Shown, expert: int) -> str:
    """What is known of the expert that a prompt goes to."""
    row = model.experts[expert]
    cells = expert_cells(row)
    macs = row["macs_ratio"] * model.summary["macs_dense"] / 1e9
    cells["MACs ratio"] += f", {macs:.3g} G MACs a step"
    del cells["expert"]
    return f"### Expert {expert}\n{as_html(cells.items())}"


def about_prompt(model: Shown, prompt: str) -> str:
    """The training prompts that are most like a prompt."""
    if model.nearest is None:
        return ""
    return f"### Nearest training prompts\n{as_html(model.nearest(prompt), ('prompt', 'expert'))}"


def picture(model: Shown, prompt: str, expert: int, how: Settings) -> tuple[Image.Image, float]:
    """An image, large enough to be seen, and its seconds, without those of loading the expert."""
    model.sample(prompt, expert, how._replace(steps=2))
    image, seconds = model.sample(prompt, expert, how)
    if image.width < SIDE:
        image = image.resize((SIDE, SIDE * image.height // image.width), Image.Resampling.BICUBIC)
    return image, seconds


def asked(prompt: str, steps: float, guidance: float, seed: float) -> tuple[str, Settings]:
    """A prompt, and how its images are generated. Raises `UserError` where there is no prompt."""
    check_prompt(prompt := one_line(prompt))
    return prompt, Settings(int(steps), guidance, int(seed))


def errors_shown(values: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same values; a `UserError` is shown in the page until it is closed."""

    def call(*given: Any) -> Iterator[Any]:
        try:
            yield from values(*given)
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None

    return call


def compare(model: Shown, *given: Any) -> Iterator[list[Any]]:
    """What is told of the prompt's expert and of the prompt, then each image when it is there."""
    prompt, how = asked(*given)
    ids, expert = [*model.experts], model.route(prompt)
    numbers = {"expert": expert, "teacher": -1, "wrong": ids[(ids.index(expert) + 1) % len(ids)]}
    told = [about_expert(model, expert), about_prompt(model, prompt)]
    yield [*told, *(gr.update(value=None, label=label) for label in model.columns.values())]
    for k, column in enumerate(model.columns):
        image, seconds = picture(model, prompt, numbers[column], how)
        number = f" ({numbers[column]})" if numbers[column] >= 0 else ""
        values = [gr.skip()] * (len(told) + len(model.columns))
        label = f"{model.columns[column]}{number}, {seconds:.2f} s"
        values[len(told) + k] = gr.update(value=image, label=label)
        yield values


def gallery(model: Shown, *given: Any) -> Iterator[dict[str, Any]]:
    """The prompt's image by each expert, one after another."""
    prompt, how = asked(*given)
    images: list[tuple[Image.Image, str]] = []
    for expert, row in model.experts.items():
        image, seconds = picture(model, prompt, expert, how)
        label = f"expert {expert}, {seconds:.2f} s, {row['macs_ratio']:.2f} of the MACs"
        images.append((image, label))
        yield gr.update(value=images, visible=True)


def build(model: Shown) -> gr.Blocks:
    """The page; one image is generated at a time."""
    summary = model.summary
    with gr.Blocks(title="APTP", analytics_enabled=False, delete_cache=DAY) as page:
        gr.Markdown(about_model(model))
        prompt = gr.Textbox(label="Prompt", placeholder="a giraffe", submit_btn="Generate")
        with gr.Row():
            steps = gr.Slider(2, 100, STEPS, step=1, label="Steps", min_width=280)
            scale = summary["guidance_scale"]
            guidance = gr.Slider(0, 20, scale, step=0.1, label="Guidance", min_width=280)
            seed = gr.Slider(0, 9999, 0, step=1, label="Seed", min_width=280)
        with gr.Row():
            buttons = ["download", "fullscreen"]  # without Gradio's own, which shares with its hub
            plain: dict[str, Any] = {"interactive": False, "buttons": buttons}
            fixed: dict[str, Any] = plain | {"min_width": 160, "height": 300}
            images = [gr.Image(label=label, **fixed) for label in model.columns.values()]
        with gr.Row():
            with gr.Column():
                why = gr.Markdown()
            with gr.Column():
                near = gr.Markdown()
        table = as_html(map(expert_cells, summary["experts"]), "keys", "wide")
        gr.Markdown(f"### The experts\n{table}")
        if "latency" in summary:
            gr.Markdown(html.escape(latency_line(summary)))
        each = gr.Button("The prompt by each expert", visible=len(model.experts) > 1)
        whole: dict[str, Any] = plain | {"object_fit": "contain", "height": "auto"}
        shown = gr.Gallery(show_label=False, columns=4, visible=False, **whole)
        if model.samples:
            gr.Markdown("### Images of their own prompts")
            gr.Image(str(model.samples), show_label=False, **plain)
        given = [prompt, steps, guidance, seed]
        own: dict[str, Any] = {"inputs": given, "concurrency_id": "model", "concurrency_limit": 1}
        told = [why, near, *images]
        prompt.submit(
            errors_shown(partial(compare, model)), outputs=told, api_name="compare", **own
        )
        each.click(errors_shown(partial(gallery, model)), outputs=shown, api_name="gallery", **own)
    return page


def launch(page: gr.Blocks, port: int | None, share: bool = False) -> tuple[str, str | None]:
    """Serve the page to this machine; its address, and the public one. Raises `UserError`."""
    try:
        return page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"]),  # fonts of this machine
            footer_links=[],
            ssr_mode=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )[1:]
    except OSError:
        which = f"--port {port} is" if port else "the ports from 7860 to 7959 are"
        raise UserError(f"{which} in use; choose another one with --port") from None


def main() -> None:
    cfg = read_options(Config, __doc__)
    page = build(load(cfg))
    here, public = launch(page, cfg.port, cfg.share)
    print(f"{here} {public or ''}".rstrip(), flush=True)
    page.block_thread()


if __name__ == "__main__":
    command_line(main)

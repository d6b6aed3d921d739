"""What the benchmark of experts rests on: which experts, run in which way, at what cost.

Everything here works on any U-Net and device; `tests/test_bench.py` runs it on a small one. The
table is made by `table.py`, the timing by the fixtures of `conftest.py`.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.units import paper_macs
from common.errors import UserError
from common.files import load_tensors, read_json
from common.randomness import step_generator
from gates import ArchSpace
from macs import CostModel, measure_macs, meet_budget
from prune_unet import cut_in_place, example_inputs, find_units, meta_copy
from teacher.shapes import CLIP_TOKENS, with_random_weights

TABLE_4 = (0.65, 0.77, 0.78, 0.79, 0.79, 0.80, 0.81, 0.83)  # MACs ratios of APTP-Base on COCO
SEED = 0
GUIDANCE = 7.5


# ---- how an expert is run ----


@dataclass(frozen=True)
class Variant:
    """One way of running a U-Net."""

    name: str
    device: str  # type of the device it is meant for
    dtype: torch.dtype
    batch: int = 1
    steps: int = 0  # of sampling with guidance; 0: one forward
    channels_last: bool = False
    compile: str = ""  # backend of torch.compile; empty: eager

    @property
    def pixels(self) -> int:
        """Pixels a side, if the user does not choose."""
        return 256 if self.device == "cpu" else 768

    @property
    def caption(self) -> str:
        what = f"{self.steps} PNDM steps with guidance" if self.steps else "one forward"
        parts = [what, f"batch {self.batch}", str(self.dtype).removeprefix("torch.")]
        parts += ["channels last"] * self.channels_last + ["torch.compile"] * bool(self.compile)
        return ", ".join(parts)


def variants() -> list[Variant]:
    """On the CPU one; on CUDA forwards in three ways, and whole samples, at batches of 1 and 8."""
    ways: dict[str, dict[str, Any]] = {
        "forward": {},
        "forward-channels-last": {"channels_last": True},
        "forward-compiled": {"channels_last": True, "compile": "inductor"},
        "sample": {"steps": 25},
    }
    on_cuda = [
        Variant(f"{name}-{batch}", "cuda", torch.float16, batch, **way)
        for name, way in ways.items()
        for batch in (1, 8)
    ]
    return [Variant("cpu", "cpu", torch.float32), *on_cuda]


def random_unet(model: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """A U-Net of the shape of `model`, frozen, with its modules' own random initialisation."""
    torch.manual_seed(0)
    return with_random_weights(meta_copy(model), device)


def prepare(model: UNet2DConditionModel, variant: Variant) -> UNet2DConditionModel:
    """`model` itself in the variant's type and layout, compiled if it says so."""
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    model.to(dtype=variant.dtype, memory_format=layout)
    if variant.compile:  # a graph for each shape; by default the ninth U-Net would run eagerly
        torch._dynamo.config.recompile_limit = 64
        model.compile(backend=variant.compile, dynamic=False)
    return model


def prepared_copy(model: UNet2DConditionModel, variant: Variant) -> UNet2DConditionModel:
    """As `prepare`, but `model` stays as it is; without need, nothing is copied."""
    as_it_is = model.dtype == variant.dtype and not (variant.channels_last or variant.compile)
    return model if as_it_is else prepare(copy.deepcopy(model), variant)


def repeated(inputs: Any, times: int, dtype: torch.dtype) -> Any:
    """Tensors, in dictionaries of any depth, `times` over along the batch; floats in `dtype`."""
    if isinstance(inputs, dict):
        return {key: repeated(value, times, dtype) for key, value in inputs.items()}
    values = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return values.repeat(times, *[1] * (values.ndim - 1))


def random_inputs(
    unet: UNet2DConditionModel, variant: Variant, latent_size: int, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of one call of a U-Net; a sample's guidance doubles the conditions."""
    one = example_inputs(unet, latent_size, CLIP_TOKENS, device)
    generator = step_generator(SEED, "inputs")
    for name in ("sample", "encoder_hidden_states"):
        one[name] = torch.randn(one[name].shape, generator=generator).to(device)
    inputs = repeated(one, variant.batch * (2 if variant.steps else 1), variant.dtype)
    return inputs | {"sample": repeated(one["sample"], variant.batch, variant.dtype)}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], steps: int = 0) -> Tensor:
    """A forward, or a sample: `steps` PNDM steps with classifier-free guidance, (B, C, h, w).

    The sample ends with the latent; encoding text and decoding the picture are not the U-Net's.
    """
    if not steps:
        return model(**inputs).sample
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        skip_prk_steps=True,
    )
    scheduler.set_timesteps(steps)
    latents = inputs["sample"]
    for t in scheduler.timesteps:
        call = inputs | {"sample": torch.cat([latents, latents]), "timestep": t.to(latents.device)}
        empty, prompted = model(**call).sample.chunk(2)
        guided = empty + GUIDANCE * (prompted - empty)
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents


# ---- which experts ----


@dataclass(frozen=True)
class Experts:
    """Binary codes (N, D), and where they come from, in words."""

    codes: Tensor
    space: ArchSpace
    source: str


def experts_of_run(folder: Path, unet: UNet2DConditionModel) -> Experts:
    """The codes of a run whose teacher's U-Net has the shape of `unet`.

    Teachers have many names, so shapes are compared: codes must have as many units as `unet`, and
    the first must cut it to the number of parameters that the run recorded for its first expert.

    Raises:
        UserError: the run is incomplete, or of another U-Net.
    """
    summary = read_json(folder / "summary.json")
    tensors, meta = load_tensors(folder / "codes.safetensors")
    codes, space = tensors["codes"].float(), find_units(unet, meta["depth"])
    if codes.shape[1] == space.size:
        expert = meta_copy(unet)
        cut_in_place(expert, space, codes[0])
        if count_parameters(expert) == summary["experts"][0]["params"]:
            return Experts(codes, space, f"the experts of {folder}")
    raise UserError(
        f"--run {folder} is from another U-Net (teacher {summary.get('teacher')}); choose its "
        "U-Net with --bench-unet, or another run"
    )


def random_experts(unet: UNet2DConditionModel, latent_size: int) -> Experts:
    """Eight codes that meet the budgets of Table 4, made from random logits."""
    space = find_units(unet)
    macs = measure_macs(unet, space, latent_size=latent_size, text_tokens=CLIP_TOKENS)
    codes = []
    for i, budget in enumerate(TABLE_4):
        logits = torch.randn(1, space.size, generator=step_generator(SEED, "codes", i))
        codes.append(meet_budget(logits, torch.ones(1), macs, budget))
    source = f"codes from random logits (seed {SEED}) that meet the budgets of the paper's Table 4"
    return Experts(torch.cat(codes), space, source)


def pick_experts(
    unet: UNet2DConditionModel, latent_size: int, folder: Path | None, root: Path
) -> Experts:
    """The experts of run `folder`, or of the newest run under `root` that fits; else random ones.

    Args:
        unet: on any device; only its configuration is used.
        latent_size: for which the random ones meet their budgets.

    Raises:
        UserError: `folder` is given and does not fit.
    """
    if folder is not None:
        return experts_of_run(folder, unet)
    runs = sorted(root.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(runs):
        try:
            return experts_of_run(path.parent, unet)
        except (UserError, KeyError):  # another U-Net's, or incomplete
            continue
    return random_experts(unet, latent_size)


# ---- costs ----


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fixed_costs(
    unet: UNet2DConditionModel, code: Tensor, macs: CostModel, latent_size: int
) -> dict[str, Any]:
    """Parameters and MACs of a code's expert, for one image and one forward; no weights needed."""
    expert = meta_copy(unet)
    cut_in_place(expert, macs.space, code)
    cost = round(macs(code).item())
    return {
        "params": count_parameters(expert),
        "macs": cost,
        "macs_paper": paper_macs(expert, latent_size=latent_size),
        "macs_ratio": cost / macs.dense,
    }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long one call takes: by CUDA events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.perf_counter()
    function()
    return time.perf_counter() - clock


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes of new tensors that one call holds at once, by PyTorch's own allocators.

    What a library takes for itself (oneDNN's reordered weights, say) is not seen on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

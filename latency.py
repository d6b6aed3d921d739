"""What a code costs in time: T(a) where experts will run. Sec. 3.2: "latency, MACs, etc.".

    python latency.py --out t.json    # the pocket teacher on this machine
    python latency.py --teacher sd21-random --device cuda --precision fp16 --runtime graph
    python train.py --cost t.json     # on this machine or another; --cost latency measures first

MACs are not seconds: normalisation, activations and launches shrink less than MACs do, and hardware
likes some widths better than others. But cutting changes inner widths alone, so a layer's time
depends on one number, how many of its units are kept. A table holds the time of each distinct shape
of layer, cut to a few widths and run alone, that of whole Transformers, and that of the whole
U-Net, dense and at its smallest. `macs.CostModel` adds them up: between two widths it interpolates,
a removable layer has its norms, projections and launches in its own region, and the rest of the
measured whole is never removed. A layer that runs alone finds its weights in the cache, so what all
layers save together is set to what the smallest U-Net saves, and again, once experts are cut, to
what they save (`correct`).

| symbol | name here | shape |
|---|---|---|
| T(a), seconds | `CostModel` of `latency_model` | (..., D) -> (...,) |

What differs from the paper: docs/departures.md#latency.
"""

from __future__ import annotations

import copy
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError, command_line
from common.files import read_json, write_json
from common.options import read_options
from common.processes import pick_device
from common.ranges import Choice, Count, Pixels, Precision, check
from gates import ArchSpace, Layer, binarize
from macs import CostModel, build_cost, meet_budget
from prune_unet import cut_in_place, cut_layer, example_inputs, find_units, meta_copy
from teacher.model import PRECISIONS
from teacher.shapes import CLIP_TOKENS, PIXELS, POCKET_TOKENS, shape_of, with_random_weights

WIDTHS = 8  # at which a layer is timed
ROUNDS = 15  # in each of which everything that is compared has its turn; where one takes ...
SLOW, FEW = 1.0, 7  # ... more than these seconds, this many
TURN = 0.005  # seconds that a turn takes at least
MOST_CALLS = 100  # in a turn
IN_GRAPH = 8  # calls in a CUDA graph, so that launching it weighs little

Runtime = Annotated[str, Choice("eager", "graph", "compile")]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a module


@dataclass(frozen=True)
class Config:
    """Measures a table of latency, for `train.py --cost`."""

    teacher: str = "pocket"
    """pocket, sd21-random, sdxl-random, ..., or a diffusers folder; its U-Net's shape is enough."""
    device: str = "auto"
    """auto, cpu (one thread), cuda, cuda:1."""
    precision: Precision = "fp32"
    """In which experts will run."""
    batch: Count = 2
    """Images in the U-Net at once; guidance takes two for each sample."""
    resolution: Pixels | None = None
    """Pixels a side; the U-Net's own if not given."""
    runtime: Runtime = "eager"
    """eager, graph (CUDA graphs), or compile (torch.compile)."""
    out: Path = Path("latency.json")
    """The table."""


@dataclass(frozen=True)
class Place:
    """Where and how a U-Net runs."""

    device: str  # `cpu`, `cuda:0`
    precision: str
    batch: int
    pixels: int
    latent_size: int
    text_tokens: int
    runtime: str = "eager"

    def check(self) -> None:
        """Raises `UserError` where nothing can be timed like this."""
        kind = torch.device(self.device).type
        if kind not in ("cpu", "cuda"):
            raise UserError(f"--device {self.device}: latency is measured on cpu and cuda")
        if self.runtime == "graph" and kind != "cuda":
            raise UserError("--runtime graph is for cuda; choose eager or compile on the CPU")

    def inputs(self, unet: nn.Module) -> dict[str, Any]:
        """Keyword arguments of the U-Net, as shapes."""
        return example_inputs(unet, self.latent_size, self.text_tokens, batch=self.batch)


def machine(device: str) -> dict[str, str]:
    """What a table says of where it was measured."""
    found = {name: version(name) for name in ("torch", "diffusers")}
    if torch.device(device).type == "cuda":
        driver = ""
        with suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
        found |= {"cuda": str(torch.version.cuda), "driver": driver.partition("\n")[0]}
    return {"device": device_name(device)} | found


def device_name(device: str) -> str:
    """A GPU's name, or the processor's."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"model name\s*:\s*(.+)", text):
            name = model[1]
    return f"{name}, {'one thread' if kind == 'cpu' else kind}"


# ---- the clock ----


def time_in_turns(modules: Sequence[nn.Module], call: Call, place: Place) -> list[float]:
    """Seconds of one call of each module, on the same arguments; weights are random.

    They take turns, so a machine that changes its speed changes it for all. Seconds are those of
    the GPU, or of one thread of the CPU, whatever else it does.

    Args:
        modules: on the meta device. The last one is what the others are compared with.
        call: arguments, on the meta device.
    """
    device = torch.device(place.device)
    if place.runtime == "compile":
        torch.compiler.reset()  # forget the last modules' graphs
    where = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with where, one_thread(), torch.no_grad():
        runs = [prepare_run(module, call, place) for module in modules]
        for run, _ in runs:  # kernels are chosen and memory is reserved
            turn(run, 1, device)
        once = [turn(run, 1, device) for run, _ in runs]
        counts = [min(MOST_CALLS, math.ceil(TURN / max(seconds, 1e-9))) for seconds in once]
        pairs = list(zip(runs, counts, strict=True))
        rounds = [
            [turn(run, n, device) / n / calls for (run, calls), n in pairs]
            for _ in range(ROUNDS if sum(once) < SLOW else min(FEW, ROUNDS))
        ]
    reference = statistics.median(times[-1] for times in rounds)
    ratios = zip(*([t / times[-1] for t in times] for times in rounds), strict=True)
    return [reference * statistics.median(ratio) for ratio in ratios]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread on the CPU, as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def turn(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that `times` calls take together."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    clock = time.thread_time()
    for _ in range(times):
        run()
    return time.thread_time() - clock


def prepare_run(module: nn.Module, call: Call, place: Place) -> tuple[Callable[[], object], int]:
    """A function that calls a module on real arguments, and how often it does so."""
    device, dtype = torch.device(place.device), PRECISIONS[place.precision]
    module = with_random_weights(module, device, dtype)
    args, kwargs = real(call, device, dtype)
    if place.runtime == "compile":
        torch._dynamo.config.recompile_limit = 64  # each width is a shape of its own
        module.compile(dynamic=False)
    if place.runtime != "graph":
        return lambda: module(*args, **kwargs), 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture wants everything set up before
        for _ in range(3):
            module(*args, **kwargs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            module(*args, **kwargs)

    def replay(keep: Any = (module, args, kwargs)) -> None:  # the graph owns none of them
        graph.replay()

    return replay, IN_GRAPH


def real(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Ordinary values in place of the meta device's tensors, in nested arguments."""
    if isinstance(value, dict):
        return {key: real(inner, device, dtype) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(real(inner, device, dtype) for inner in value)
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, device=device, dtype=dtype)
    return torch.zeros(value.shape, device=device, dtype=value.dtype)


Clock = Callable[[Sequence[nn.Module], Call, Place], list[float]]


# ---- tables ----


def parts_of(unet: nn.Module) -> dict[str, Layer | None]:
    """What is timed, by path: layers of units, whole Transformers, and the whole U-Net, ""."""
    space = find_units(unet, "all")
    parts: dict[str, Layer | None] = {"": None}
    parts |= {layer.name: None for layer in space.depth_layers}
    return parts | {layer.name: layer for layer in space.width_layers}


def calls_of(unet: nn.Module, names: Sequence[str], inputs: dict[str, Any]) -> dict[str, Call]:
    """The arguments of modules in one forward of a U-Net of the meta device, by path."""
    found: dict[str, Call] = {}

    def keep(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found[name] = args, kwargs

    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name in names
    ]
    with torch.no_grad():
        unet(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def shape_name(module: nn.Module, layer: Layer | None, call: Call) -> str:
    """All that a module's time depends on, in words; two modules of one name take one time."""

    def shapes(value: Any) -> list[str]:
        if isinstance(value, dict | tuple):
            inner = value.values() if isinstance(value, dict) else value
            return [shape for part in inner for shape in shapes(part)]
        return ["x".join(map(str, value.shape))] if isinstance(value, Tensor) else []

    units = [f"{layer.units} units"] if layer else []
    params = sum(parameter.numel() for parameter in module.parameters())
    inputs = f"inputs {' '.join(shapes(call))}"
    return ", ".join([type(module).__name__, *units, f"{params} parameters", inputs])


def named_parts(unet: nn.Module, place: Place) -> dict[str, tuple[str, Layer | None, Call]]:
    """Of everything that is timed, by path: its shape's name, its units, its arguments."""
    parts = parts_of(unet)
    calls = calls_of(unet, list(parts), place.inputs(unet))
    return {
        path: (shape_name(unet.get_submodule(path), layer, calls[path]), layer, calls[path])
        for path, layer in parts.items()
    }


def widths(units: int) -> list[int]:
    """Up to `WIDTHS` kept numbers of units, from one to all."""
    return sorted({round(k) for k in torch.linspace(1, units, WIDTHS).tolist()})


def measure_table(unet: nn.Module, place: Place, clock: Clock = time_in_turns) -> dict[str, Any]:
    """Time a U-Net's layers, for `latency_model`, as what JSON can hold. Raises `UserError`.

    Args:
        unet: on any device; only its configuration is used.
        clock: as `time_in_turns`.
    """
    place.check()
    unet = meta_copy(unet)
    curves: dict[str, dict[str, list[Any]]] = {}
    for path, (name, layer, call) in tqdm(named_parts(unet, place).items(), desc="timing"):
        if name in curves:
            continue
        kept = widths(layer.units) if layer else [1] if path else [0, 1]
        modules = [copy.deepcopy(unet.get_submodule(path)) for _ in kept]
        for module, K in zip(modules, kept, strict=True):
            if layer:
                cut_layer(module, layer, torch.arange(K))
        if not path:  # the whole U-Net
            space = find_units(unet, "all")
            cut_in_place(modules[0], space, binarize(torch.zeros(space.size), space))
        curves[name] = {"kept": kept, "seconds": clock(modules, call, place)}
    return {"place": asdict(place), "machine": machine(place.device), "curves": curves}


def read_table(path: str) -> dict[str, Any]:
    """A table that `latency.py` wrote. Raises `UserError`."""
    if not Path(path).is_file():
        raise UserError(
            f"--cost {path} is neither macs, nor latency, nor a file; make a table with latency.py"
        )
    found = read_json(Path(path))
    try:
        Place(**found["place"])
        right = isinstance(found["machine"]["device"], str) and all(
            len(curve["kept"]) == len(curve["seconds"]) > 0
            and curve["kept"] == sorted(set(curve["kept"]))
            and all(0 < seconds < math.inf for seconds in curve["seconds"])
            for curve in found["curves"].values()
        )
    except (AttributeError, KeyError, TypeError):
        right = False
    if not right:
        raise UserError(f"--cost {path} is no table of latency; make one with latency.py")
    return found


def latency_model(unet: nn.Module, space: ArchSpace, table: dict[str, Any]) -> CostModel:
    """T(a) in seconds of one forward. Raises `UserError` where the table is of another U-Net.

    A table serves every depth: which layers can be removed is what `space` says.

    Args:
        unet: on any device; only its configuration is used.
    """
    place = Place(**table["place"])
    parts = named_parts(meta_copy(unet), place)
    for path, (name, layer, _) in parts.items():
        needed = widths(layer.units)[-1:] if layer else [1] if path else [0, 1]
        if table["curves"].get(name, {}).get("kept", [])[-len(needed) :] != needed:
            raise UserError(
                f"the table of --cost is of another U-Net: it does not know {name}; make one for "
                "this teacher with latency.py"
            )

    def seconds(path: str) -> list[float]:
        """Wider layers do not take less time, up to the clock's errors."""
        return isotonic_regression(table["curves"][parts[path][0]]["seconds"]).x.tolist()

    def kept_of(path: str) -> list[int]:
        return table["curves"][parts[path][0]]["kept"]

    def sum_of(space: ArchSpace) -> CostModel:
        curves = [(kept_of(layer.name), seconds(layer.name)) for layer in space.width_layers]
        contents = [seconds(layer.name)[-1] for layer in space.depth_layers]
        return build_cost(space, curves, contents, dense, unit="seconds")

    smallest, dense = seconds("")
    saved = dense - sum_of(find_units(unet, "all")).floor
    return sum_of(space).with_savings((dense - smallest) / saved if saved > 0 else 1.0)


# ---- against the experts that were cut ----


def time_experts(
    unet: nn.Module,
    codes: Tensor,
    cost: CostModel,
    place: Place,
    clock: Clock = time_in_turns,
) -> Tensor:
    """Seconds of each expert, (N,): its share of the dense U-Net's, timed in turns with it.

    Args:
        unet: the dense one, on any device; only its configuration is used.
        codes: binary, (N, D).
        cost: T(a), which says what the dense U-Net takes.
    """
    call: Call = ((), place.inputs(unet))
    found: dict[tuple[float, ...], float] = {}  # experts may share a code
    for code in tqdm(codes, desc="timing experts"):
        if (key := tuple(code.tolist())) not in found:
            expert, dense = meta_copy(unet), meta_copy(unet)
            cut_in_place(expert, cost.space, code)
            own, other = clock([expert, dense], call, place)
            found[key] = own / other * cost.dense
    return torch.tensor([found[tuple(code.tolist())] for code in codes], dtype=torch.float64)


def correct(cost: CostModel, codes: Tensor, shares: Tensor, seconds: Tensor) -> CostModel:
    """T(a) whose mean saving is that of the experts that were timed; the dense model's T stays.

    Args:
        codes: binary, (N, D).
        shares: of the prompts, (N,).
        seconds: what `codes` take, (N,).
    """
    shares = shares.double()
    predicted, measured = (float(shares @ (cost.dense - t)) for t in (cost(codes), seconds))
    return cost.with_savings(max(measured, 0.0) / predicted) if predicted > 0 else cost


def meet_in_time(
    unet: nn.Module,
    cost: CostModel,
    table: dict[str, Any],
    *,
    device: str,
    budget: float,
    logits: Tensor,
    shares: Tensor,
    clock: Clock = time_in_turns,
) -> tuple[Tensor, dict[str, Any], list[dict[str, Any]]]:
    """Codes whose measured time meets the budget, and what `summary.json` says of their time.

    Experts are cut and timed where the table was measured; elsewhere the prediction has to do.

    Args:
        unet: the dense one.
        cost: T(a) of the table.
        device: where experts can be timed, such as `cuda:0`.
        logits: of which the lowest are closed, (N, D).
        shares: of the prompts, (N,).
    """
    codes, measured = meet_budget(logits, shares, cost, budget), None
    if table["machine"]["device"] == device_name(device):
        place = Place(**table["place"] | {"device": device})
        cost = correct(cost, codes, shares, time_experts(unet, codes, cost, place, clock))
        within = min(1.0, max(budget, cost.floor / cost.dense))  # what is left is told
        codes = meet_budget(logits, shares, cost, within)
        measured = time_experts(unet, codes, cost, place, clock)
    predicted = cost(codes)  # (N,)
    known = predicted if measured is None else measured
    mean = shares.double() @ known / shares.double().sum()
    latency = table["place"] | table["machine"] | {"dense": cost.dense}
    summary = {"latency": latency, "latency_ratio_mean": mean.item() / cost.dense}
    experts = [
        {
            "latency_ratio": known[i].item() / cost.dense,
            "latency_predicted": predicted[i].item(),
            "latency_measured": None if measured is None else measured[i].item(),
        }
        for i in range(len(codes))
    ]
    return codes, summary, experts


# ---- the command ----


def place_of(cfg: Config) -> tuple[nn.Module, Place]:
    """The U-Net that a command times, and where. Raises `UserError`."""
    check(cfg)
    unet = shape_of(cfg.teacher)
    pixels = cfg.resolution or PIXELS * unet.config.sample_size
    if pixels % PIXELS:
        raise UserError(f"--resolution {pixels} is not a multiple of {PIXELS}")
    device = pick_device(cfg.device)
    tokens = POCKET_TOKENS if cfg.teacher == "pocket" else CLIP_TOKENS
    return unet, Place(
        str(device), cfg.precision, cfg.batch, pixels, pixels // PIXELS, tokens, cfg.runtime
    )


def main() -> None:
    cfg = read_options(Config, __doc__)
    unet, place = place_of(cfg)
    table = {"teacher": cfg.teacher} | measure_table(unet, place)
    write_json(cfg.out, table)
    cost = latency_model(unet, find_units(unet, "all"), table)
    print(
        f"{cfg.out}: {cfg.teacher} at {place.pixels} px on {table['machine']['device']}, "
        f"{place.precision}, batch {place.batch}, {place.runtime}: {cost.dense * 1e3:.3g} ms a "
        f"forward; with everything prunable gone {cost.floor / cost.dense:.3f} is left"
    )


if __name__ == "__main__":
    command_line(main)

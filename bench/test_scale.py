"""The pruning stage at the true shapes: does it fit, and how long does it take? On any CPU.

    pytest bench/test_scale.py --benchmark-only                # both
    pytest bench/test_scale.py --benchmark-only -k sdxl

Stable Diffusion 2.1: three real steps (one of warm-up, two joint) on 865.9 M random weights at
256 px, two images at once, with four experts. SDXL: two steps on 2567.5 M random weights in bf16,
one image at once, with two experts. Then an expert is cut, written, loaded and used to generate an
image, and of Stable Diffusion another is refitted on 8 images. Each is a process of its own, whose
peak memory is measured. The commands are the user's.

It is skipped unless named, since it takes minutes, up to 16 GB of memory and 5 GB of disk.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from common.files import read_json

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # prunable units, bytes of memory, precision, what is asked of train.py
    "sd21": (
        1620,
        9e9,
        "fp32",
        "--warmup-steps 1 --joint-steps 2 --batch-size 4 --micro-batch 2 --num-experts 4",
    ),
    "sdxl": (
        5394,
        16e9,
        "bf16",
        "--warmup-steps 1 --joint-steps 1 --batch-size 2 --micro-batch 1 --num-experts 2",
    ),
}
TRAIN = (  # the start at the importance would take many more forwards than the steps
    "train.py --target emoji --depth paper --resolution 256 --limit 16 --device cpu "
    "--no-importance-start"
)
REFIT = "finetune.py --expert 1 --steps 0 --refit-images 8 --device cpu"
SAMPLE = "sample.py giraffe --expert 0 --steps 2 --resolution 256 --device cpu"
CUT = """
import sys
from pathlib import Path
from prune_unet import cut_expert, find_units, load_expert, save_expert
from run import expert_path, load_codes
from common.files import read_json
from teacher.model import load_teacher

run, teacher, precision = Path(sys.argv[2]), *sys.argv[3:]
unet = load_teacher(teacher, precision=precision).unet
space = find_units(unet)
code = load_codes(run, space)[0]
tensors = cut_expert(unet, code, space).state_dict()
save_expert(expert_path(run, 0), tensors, unet.config, code, space, {"expert": 0})
del tensors
del unet
expert, meta = load_expert(expert_path(run, 0))
params = sum(p.numel() for p in expert.parameters())
assert params == read_json(run / "summary.json")["experts"][0]["params"], params
assert meta["code"] == code.int().tolist()
"""


def measured(what: str, arguments: list[str]) -> dict[str, float]:
    """Run Python with these arguments: seconds, and peak memory in bytes; said at once."""
    clock = time.time()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    unit = 1 if sys.platform == "darwin" else 1024
    used = {"seconds": time.time() - clock, "peak": unit * usage.ru_maxrss}
    print(f"{what}: {used['seconds']:.0f} s, peak memory {used['peak'] / 1e9:.2f} GB", flush=True)
    return used


@pytest.mark.parametrize("shape", SHAPES)
def test_pruning_at_the_true_shape(benchmark, request, tmp_path, shape):
    if not any("test_scale" in given for given in request.config.args):
        pytest.skip("takes minutes and up to 16 GB; name bench/test_scale.py to run it")
    run, images = tmp_path / "run", tmp_path / "images"
    units, most, precision, options = SHAPES[shape]
    teacher, same = f"{shape}-random", f"--precision={precision}"
    # bf16 as on a CPU that has it; `bf16.py` says how
    train, sample = (
        (["-m", "bench.bf16"] if precision == "bf16" else []) + words.split()
        for words in (TRAIN, SAMPLE)
    )
    commands = {
        "pruning": [*train, f"--teacher={teacher}", *options.split(), same, f"--out={run}"],
        "cut, save, load": ["-c", CUT, "--run", str(run), teacher, precision],
        "two denoising steps": [*sample, same, f"--run={run}", f"--out={images}"],
    }
    if shape == "sd21":  # SDXL's weights in float32 beside the teacher's leave no room
        commands["refitting an expert"] = [*REFIT.split(), f"--run={run}"]
    found = benchmark.pedantic(
        lambda: {what: measured(what, arguments) for what, arguments in commands.items()}, rounds=1
    )
    benchmark.extra_info.update(found)
    steps = 3 if shape == "sd21" else 2
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + steps
    summary = read_json(run / "summary.json")
    assert summary["units"] == units and summary["macs_ratio_mean"] == pytest.approx(0.78, rel=0.01)
    with Image.open(images / "giraffe-0.png") as image:
        assert image.size == (256, 256)
    shutil.rmtree(run)
    assert max(used["peak"] for used in found.values()) < most

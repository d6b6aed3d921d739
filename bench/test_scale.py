"""The pruning stage at SD 2.1's true shape: does it fit, and how long does it take? On any CPU.

    pytest bench/test_scale.py --benchmark-only

Three real steps (one of warm-up, two joint) on 865.9 M random weights at 256 px, two images at
once, with four experts; then an expert is cut, written, loaded and drawn with. Each is a process of
its own, whose peak memory is measured. The commands are the user's.

It is skipped unless named, since it takes minutes, 8 GB of memory and 3 GB of disk.
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
TARGET = 9e9  # bytes of memory
TRAIN = (
    "train.py --target emoji --teacher sd21-random --resolution 256 --warmup-steps 1 "
    "--joint-steps 2 --batch-size 4 --micro-batch 2 --num-experts 4 --limit 16 --device cpu"
)
SAMPLE = "sample.py giraffe --expert 0 --steps 2 --resolution 256 --device cpu"
CUT = """
import sys
from pathlib import Path
from finetune import expert_path, load_codes
from gates import ArchSpace
from prune_unet import cut_expert, load_expert, save_expert
from common.files import read_json
from teacher.model import load_teacher

run = Path(sys.argv[2])
unet = load_teacher("sd21-random").unet
space = ArchSpace.from_unet(unet)
code = load_codes(run, space)[0]
save_expert(expert_path(run, 0), cut_expert(unet, code, space), code, space, {"expert": 0})
del unet
expert, meta = load_expert(expert_path(run, 0))
params = sum(p.numel() for p in expert.parameters())
assert params == read_json(run / "summary.json")["experts"][0]["params"], params
assert meta["code"] == code.int().tolist()
"""


def measured(arguments: list[str]) -> dict[str, float]:
    """Run Python with these arguments: seconds, and peak memory in bytes."""
    clock = time.time()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.time() - clock, "peak": unit * usage.ru_maxrss}


def test_pruning_at_the_true_shape(benchmark, request, tmp_path):
    if not any("test_scale" in given for given in request.config.args):
        pytest.skip("takes minutes and 8 GB; name bench/test_scale.py to run it")
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    commands = {
        "pruning": [*TRAIN.split(), f"--out={run}"],
        "cut, save, load": ["-c", CUT, "--run", str(run)],
        "two denoising steps": [*SAMPLE.split(), f"--run={run}", f"--out={drawn}"],
    }
    found = benchmark.pedantic(
        lambda: {what: measured(arguments) for what, arguments in commands.items()}, rounds=1
    )
    benchmark.extra_info.update(found)
    for what, used in found.items():
        print(f"{what}: {used['seconds']:.0f} s, peak memory {used['peak'] / 1e9:.2f} GB")
    assert len((run / "metrics.csv").read_text().splitlines()) == 4
    summary = read_json(run / "summary.json")
    assert summary["units"] == 1620 and summary["macs_ratio_mean"] == pytest.approx(0.78, rel=0.01)
    with Image.open(drawn / "giraffe-0.png") as image:
        assert image.size == (256, 256)
    shutil.rmtree(run)
    assert max(used["peak"] for used in found.values()) < TARGET

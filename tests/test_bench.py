"""The benchmark of experts: what it picks, how it runs, counts and reports; the whole once."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LAYOUTS
from diffusers import PNDMScheduler, UNet2DConditionModel
from PIL import Image

import bench.conftest
from bench import costs, table
from common.errors import UserError
from common.files import save_tensors, write_json
from macs import measure_macs, module_macs
from prune_unet import cut_expert, example_inputs

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LATENT = 8


@pytest.fixture(scope="module")
def small() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**LAYOUTS["sd2"]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def macs(small):
    return measure_macs(small, latent_size=LATENT)


# ---- how an expert is run ----


def test_a_variant_computes_what_the_unet_does(small):
    """In double precision, channels last and batched: the same numbers, in a copy of its own."""
    plain = costs.Variant("plain", "cpu", torch.float32)
    variant = costs.Variant("all", "cpu", torch.float64, 3, channels_last=True)
    model = costs.prepared_copy(small, variant)
    outputs = costs.run(model, costs.random_inputs(small, variant, LATENT, CPU))
    expected = costs.run(small, costs.random_inputs(small, plain, LATENT, CPU))
    assert outputs.shape == (3, 4, LATENT, LATENT) and outputs.dtype == torch.float64
    assert torch.allclose(outputs.float(), expected.expand(3, -1, -1, -1), atol=1e-5)
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert small.dtype == torch.float32 and small.conv_in.weight.is_contiguous()
    assert costs.prepared_copy(small, plain) is small


def test_every_expert_is_compiled():
    """More shapes of one class than `torch.compile` keeps graphs of by default."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    variant = costs.Variant("compiled", "cpu", torch.float64, compile=backend)
    for channels in range(1, 13):
        layer = costs.prepare(torch.nn.Conv2d(channels, channels, 1), variant)
        features = torch.randn(1, channels, 2, 2, dtype=torch.float64)
        expected = torch.nn.functional.conv2d(features, layer.weight, layer.bias)
        assert torch.allclose(layer(features), expected)
    assert len(graphs) == 12
    torch.compiler.reset()


def test_sampling_finds_the_picture_that_a_perfect_model_predicts():
    """A model that always means x0 says v = (sqrt(a) x_t - x0) / sqrt(1 - a)."""
    alphas = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    x0 = torch.rand(2, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(1))
    batches = []

    def model(sample, timestep, encoder_hidden_states):
        assert len(sample) == len(encoder_hidden_states) == 4  # without and with the prompt
        batches.append(timestep)
        a = alphas[timestep]
        return SimpleNamespace(sample=(a.sqrt() * sample - torch.cat([x0, x0])) / (1 - a).sqrt())

    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    inputs = {"sample": noise, "timestep": None, "encoder_hidden_states": torch.zeros(4, 5, 16)}
    drawn = costs.run(model, inputs, steps=25)
    assert len(batches) == 26  # PNDM takes its second step twice
    assert (drawn - x0).abs().max() < 0.1 < (noise - x0).abs().max()


def test_sdxls_further_conditions_are_batched():
    sdxl = UNet2DConditionModel(**LAYOUTS["sdxl"]).eval()
    variant = costs.Variant("sample", "cpu", torch.float64, batch=2, steps=1)
    inputs = costs.random_inputs(sdxl, variant, LATENT, CPU)
    assert {len(value) for value in inputs["added_cond_kwargs"].values()} == {4}
    assert costs.run(sdxl.double(), inputs, 1).shape == (2, 4, LATENT, LATENT)


# ---- which experts ----


@pytest.fixture
def write_run(tmp_path):
    """write_run(name, codes, params, age): a run folder, as far as the benchmark reads it."""

    def write(name: str, codes: torch.Tensor, params: int, age: int) -> Path:
        folder = tmp_path / "runs" / name
        save_tensors(folder / "codes.safetensors", {"codes": codes.byte()}, {"depth": "paper"})
        experts = [{"id": i, "params": params} for i in range(len(codes))]
        write_json(folder / "summary.json", {"teacher": name, "experts": experts})
        os.utime(folder / "summary.json", (1e9 - age, 1e9 - age))
        return folder

    return write


def test_the_newest_run_of_the_same_shape_is_taken(small, macs, write_run, tmp_path):
    codes = costs.random_experts(small, LATENT).codes
    params = costs.count_parameters(cut_expert(small, codes[0]))
    old = write_run("old", codes[:1], params, age=30)
    assert old.name in costs.pick_experts(small, LATENT, None, tmp_path / "runs").source
    good = write_run("good", codes[:3], params, age=20)
    other_shape = write_run("other-shape", codes, params + 1, age=10)
    other_space = write_run("other-space", torch.ones(4, macs.space.size + 1), params, age=5)
    (write_run("broken", codes, params, age=0) / "codes.safetensors").write_bytes(b"nothing")
    found = costs.pick_experts(small, LATENT, None, tmp_path / "runs")
    assert str(good) in found.source and torch.equal(found.codes, codes[:3])
    assert str(old) in costs.pick_experts(small, LATENT, old, tmp_path / "runs").source
    for wrong in (other_shape, other_space):
        with pytest.raises(UserError, match=f"{wrong.name}.*another U-Net"):
            costs.pick_experts(small, LATENT, wrong, tmp_path / "runs")


def test_without_a_run_codes_meet_the_budgets_of_table_4(small, macs, tmp_path):
    found = costs.pick_experts(small, LATENT, None, tmp_path)
    assert "random" in found.source and "Table 4" in found.source
    ratios = macs(found.codes) / macs.dense
    budgets = torch.tensor([0.65, 0.77, 0.78, 0.79, 0.79, 0.80, 0.81, 0.83], dtype=torch.float64)
    assert (ratios <= budgets + 1e-9).all() and (ratios > 0.99 * budgets).all()
    assert torch.equal(found.codes, costs.pick_experts(small, LATENT, None, tmp_path).codes)
    assert not torch.equal(found.codes[3], found.codes[4])  # one budget, two architectures


# ---- costs ----


def test_costs_are_those_of_the_cut_network(small, macs):
    codes = costs.random_experts(small, LATENT).codes
    for code in (torch.ones(macs.space.size), codes[0]):
        expert = cut_expert(small, code)
        found = costs.fixed_costs(small, code, macs, LATENT)
        counted = module_macs(expert, example_inputs(small, LATENT, 77, "cpu"))[""]
        assert found["macs"] == counted == round(macs(code).item())
        assert found["macs_ratio"] == pytest.approx(counted / macs.dense)
        assert found["params"] == sum(p.numel() for p in expert.parameters())
        assert costs.weight_bytes(expert.half()) == 2 * found["params"]


def test_the_peak_is_of_what_is_held_at_once():
    def work() -> None:
        first = torch.ones(1_000_000)  # 4 MB
        both = first + 1  # 8 MB
        del first
        torch.cat([both, both])  # 12 MB

    torch.ones(3_000_000)  # gone before
    assert costs.peak_bytes(work, CPU) == pytest.approx(12e6, rel=1e-3)


def test_the_ratio_is_blind_to_a_machine_that_changes_speed():
    drift = np.array([1.0, 1.0, 1.1, 3.0, 2.9, 1.0, 1.0])
    noise = np.array([1.0, 0.99, 1.0, 1.01, 1.0, 5.0, 1.0])  # one disturbed round
    assert table.paired_ratio(0.7 * drift * noise, drift) == pytest.approx(0.7)
    found = table.spread(drift)
    low, middle, high = np.percentile(drift, [25, 50, 75])
    assert found == pytest.approx({"latency_median": middle, "latency_iqr": high - low})
    assert table.spread([2.0]) == {"latency_median": 2.0, "latency_iqr": 0.0}


@pytest.mark.parametrize(
    ("ratio", "target", "ending"),
    [(1.05, 1.05, "at most: met"), (1.06, 1.05, "at most: MISSED"), (9, None, "9.000")],
)
def test_a_target_is_met_or_missed(ratio, target, ending):
    line = table.verdict({"what": "ours / theirs", "ratio": ratio, "target": target})
    assert line.startswith("ours / theirs: ") and line.endswith(ending)


# ---- the whole ----


def test_the_suite_ends_with_the_table_and_its_targets(small, write_run, tmp_path):
    """Two experts of a run and one comparison, as `pytest bench/` runs them, on a small U-Net."""
    small.save_config(tmp_path / "unet")
    codes = costs.random_experts(small, LATENT).codes[:2]
    params = costs.count_parameters(cut_expert(small, codes[0]))
    run = write_run("mine", codes, params, age=0)
    options = ["--run", str(run), "--bench-pixels", "64", "--bench-rounds", "3"]
    options += ["--bench-unet", str(tmp_path / "unet"), "--bench-out", str(tmp_path / "out")]
    options += ["--benchmark-only", "--benchmark-json", str(tmp_path / "found.json")]
    files = ["bench/test_experts.py", "bench/test_method.py", "-k", "expert and cpu or pot"]
    alone = {k: v for k, v in os.environ.items() if "XDIST" not in k}  # else nothing is timed
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, *options],
        cwd=ROOT,
        env=alone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    macs = measure_macs(small, latent_size=LATENT)
    found = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    infos = {entry["extra_info"].get("expert"): entry["extra_info"] for entry in found}
    for expert, code in enumerate(codes):
        info = infos[expert]
        assert info["macs"] == round(macs(code).item())
        assert info["macs_ratio"] == pytest.approx(info["macs"] / macs.dense)
        assert info["unet"].endswith("unet") and info["pixels"] == 64 and str(run) in info["codes"]
        ratios = np.divide(info["seconds"], info["dense"]["seconds"])
        assert len(ratios) == 3 and info["latency_ratio"] == pytest.approx(np.median(ratios))
    assert infos[None]["what"].startswith("sinkhorn / POT") and infos[None]["target"] == 1.0

    with (tmp_path / "out" / "experts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["expert"] for row in rows] == ["dense", "0", "1"]
    assert [int(row["macs"]) for row in rows] == [
        round(macs.dense),
        *macs(codes).round().int().tolist(),
    ]
    assert [int(row["params"]) for row in rows[:2]] == [costs.count_parameters(small), params]
    for row, code in zip(rows, [torch.ones(macs.space.size), *codes], strict=True):
        assert row["macs_paper"] == str(costs.fixed_costs(small, code, macs, LATENT)["macs_paper"])
        assert float(row["speed_up"]) == pytest.approx(1 / float(row["latency_ratio"]))
        assert int(row["peak_bytes"]) > 4 * int(row["params"])
    pooled = [value for expert in (0, 1) for value in infos[expert]["dense"]["seconds"]]
    assert float(rows[0]["latency_median"]) == pytest.approx(np.median(pooled))

    with Image.open(tmp_path / "out" / "experts.png") as picture:
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 3
    lines = [line for line in finished.stdout.splitlines() if line.strip()]
    assert "2 passed" not in lines[-1] and "3 passed" in lines[-1]
    assert lines[-2].startswith("sinkhorn / POT") and "target 1 at most" in lines[-2]
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["expert", "parameters"])
    cells = [line.split() for line in lines[head + 1 : head + 4]]
    assert [line[0] for line in cells] == ["dense", "0", "1"]
    assert [float(line[7]) for line in cells] == [
        1.0,
        *macs(codes).div(macs.dense).numpy().round(3),
    ]


def test_a_run_that_does_not_fit_is_refused_in_one_line(small, tmp_path):
    small.save_config(tmp_path / "unet")
    given = {"--run": tmp_path / "nowhere", "--bench-unet": str(tmp_path / "unet")}
    config = SimpleNamespace(
        invocation_params=SimpleNamespace(args=[]),
        option=SimpleNamespace(),
        getoption=lambda name: given.get(name),
        rootpath=tmp_path,
        stash={},
    )
    with pytest.raises(pytest.UsageError, match=r"nowhere.summary.json is missing[^\n]*$"):
        bench.conftest.pytest_configure(config)
    given["--run"] = None
    bench.conftest.pytest_configure(config)
    assert "random" in config.stash[bench.conftest.EXPERTS].source

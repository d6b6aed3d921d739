"""What a pruning method is given: noised rows, and the importance that codes start from."""

import copy
import dataclasses
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROWS
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import Tensor

import losses
import problem as problems
from common.errors import UserError
from common.files import load_tensors
from common.randomness import batch_rows, step_generator
from macs import meet_budget
from prune_unet import attach_gates, gated_module
from teacher.model import Noised

B = 6  # rows a batch
EMPTY = torch.full((5, 16), 7.0)  # text states of the tiny teacher's empty caption


def taylor_batch(problem: problems.Problem, step: int) -> tuple[Tensor, Noised]:
    """The rows and the noised batch that step `step` of the importance looks at."""
    rows = batch_rows(ROWS, B, problem.cfg.seed, step)
    return rows, problem.noised(rows, step_generator(problem.cfg.seed, "taylor", step))


# ---- noised rows ----


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_shared_out_batch_is_the_whole_one_in_parts(problem_of, smallest, dropout):
    problem = problem_of(smallest)
    rows = batch_rows(ROWS, B, 0, 1)
    whole = problem.noised(rows, step_generator(0, "train", 1), dropout=dropout)
    for rank in range(2):
        own = torch.arange(rank, B, 2)
        part = problem.noised(rows[own], step_generator(0, "train", 1), own, dropout)
        for name in ("sample", "t", "target"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[own]), name
        assert torch.equal(part.conditions.text, whole.conditions.text[own])


def test_dropout_replaces_that_share_of_captions_by_the_empty_one(problem_of, smallest):
    problem = problem_of(smallest)
    rows, dropped = torch.arange(ROWS), []
    for step in range(20):
        batch = problem.noised(rows, step_generator(0, "dropout", step), dropout=0.3)
        empty = (batch.conditions.text == EMPTY).flatten(1).all(1)
        assert torch.equal(batch.conditions.text[~empty], problem.encoded.conditions.text[~empty])
        dropped.append(empty)
    shares = torch.stack(dropped).float()
    assert shares.mean().item() == pytest.approx(0.3, abs=0.07)
    assert len(shares.unique(dim=0)) == 20  # others each time
    plain = problem.noised(rows, step_generator(0, "dropout", 0))
    assert torch.equal(plain.conditions.text, problem.encoded.conditions.text)


# ---- Taylor importance ----


def weight_sums(unet, space) -> torch.Tensor:
    """Sum of w dL/dw over the weights that each gate scales, from the weights' own gradients."""
    sums = torch.full((space.size,), torch.nan)
    for layer in space.width_layers:
        weight = gated_module(unet, layer)[0].weight
        products = (weight * weight.grad).transpose(0, 1)  # a row an input channel
        sums[layer.span] = products.reshape(layer.units, -1).sum(1)
    for layer in space.depth_layers:
        module = unet.get_submodule(layer.name)
        is_resnet = layer.name.split(".")[-2] == "resnets"
        if is_resnet and (module.conv_shortcut is not None or module.output_scale_factor != 1):
            continue  # the branch is not all that the gate scales
        last = module.conv2 if is_resnet else module.proj_out
        sums[layer.start] = sum((w * w.grad).sum() for w in last.parameters())
    return sums


@pytest.mark.parametrize("least_loss", [0.05, 0.9])
def test_taylor_importance_is_that_of_the_weights(problem_of, unet, monkeypatch, least_loss):
    """Gates' gradients against weights' gradients, a sample at a time, by interval and loss."""
    monkeypatch.setattr(problems, "TAYLOR_BATCHES", 2)
    monkeypatch.setattr(problems, "LEAST_LOSS", least_loss)
    problem = problem_of(unet, depth="all")
    trained = copy.deepcopy(unet).requires_grad_(True)
    found: dict[int, list] = {}
    for step in range(2):
        _, batch = taylor_batch(problem, step)
        for row in range(B):
            part = batch.part(torch.tensor([row]))
            trained.zero_grad()
            loss = losses.denoising_loss(trained(**part.inputs()).sample, part.target).sum()
            loss.backward()
            change = weight_sums(trained, problem.space).abs()
            found.setdefault(int(part.t) * 20 // 1000, []).append((loss.item(), change))
    mean_losses = {i: sum(x for x, _ in pairs) / len(pairs) for i, pairs in found.items()}
    counted = [i for i, x in mean_losses.items() if x > least_loss * max(mean_losses.values())]
    assert least_loss < 0.5 or 0 < len(counted) < len(found)
    expected = sum(torch.stack([g for _, g in found[i]]).mean(0) for i in counted)
    (scores,) = problems.taylor_importance(problem)
    known = ~expected.isnan()
    assert known[: problem.macs.unit_cost.shape[0]].all()
    assert known.sum() > problem.macs.unit_cost.shape[0]  # depth units among them
    assert torch.allclose(scores[known], expected[known].detach(), rtol=1e-3, atol=1e-6)


def test_a_micro_batch_changes_nothing(problem_of, unet, monkeypatch):
    monkeypatch.setattr(problems, "TAYLOR_BATCHES", 2)
    clusters = torch.arange(ROWS) % 3
    whole = problems.taylor_importance(problem_of(unet), clusters)
    parts = problems.taylor_importance(problem_of(unet, micro_batch=4), clusters)
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("K", [1, 3, ROWS])
def test_importance_of_a_cluster_is_that_of_its_own_samples(problem_of, smallest, monkeypatch, K):
    """By brute force: each sample's gradient alone, averaged by cluster and interval."""
    monkeypatch.setattr(problems, "INTERVALS", 2)
    monkeypatch.setattr(problems, "LEAST_LOSS", 0.0)
    problem, draw = problem_of(smallest), torch.Generator().manual_seed(1)
    clusters = torch.randint(K, (ROWS,), generator=draw)
    clusters[0] = K - 1
    gates = attach_gates(smallest, problem.space)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for step in range(3):
        rows, batch = taylor_batch(problem, step)
        for place, row in enumerate(rows.tolist()):
            part = batch.part(torch.tensor([place]))
            a = torch.ones(1, problem.space.size, requires_grad=True)
            gates.set_gates(a)
            ((smallest(**part.inputs()).sample - part.target) ** 2).mean().backward()
            cell = int(clusters[row]), int(part.t >= 500)
            found.setdefault(cell, []).append(a.grad[0].abs())
    gates.detach()
    expected = torch.zeros(K, problem.space.size)
    for (k, _), gradients in found.items():
        expected[k] += torch.stack(gradients).mean(0)
    scores = problems.taylor_importance(problem, clusters, 3)
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-6)


def test_the_whole_is_the_mean_of_the_clusters_by_their_shares(problem_of, smallest, monkeypatch):
    monkeypatch.setattr(problems, "INTERVALS", 1)
    problem = problem_of(smallest)
    clusters = torch.arange(ROWS).clamp(max=9) // 3  # 3, 3, 3 and 15 rows, each seen once
    each = problems.taylor_importance(problem, clusters, ROWS // B)
    (whole,) = problems.taylor_importance(problem, batches=ROWS // B)
    shares = torch.bincount(clusters) / ROWS
    assert len(each) == 4 and not torch.allclose(each[0], each[3], rtol=0.1)
    assert torch.allclose(shares @ each, whole, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def loss_changes(problem, size: float) -> torch.Tensor:
    """Mean over samples of |loss without `size` of a unit - loss|, one unit at a time, (D,)."""
    unet, D = problem.teacher.unet, problem.space.size
    codes = torch.cat([torch.ones(1, D), torch.ones(D, D) - size * torch.eye(D)])  # dense first
    gates = attach_gates(unet, problem.space)
    _, batch = taylor_batch(problem, 0)
    total = torch.zeros(D)
    for row in range(B):
        part = batch.part(torch.full((D + 1,), row))
        gates.set_gates(codes)
        loss = losses.denoising_loss(unet(**part.inputs()).sample.double(), part.target.double())
        total += (loss[1:] - loss[0]).abs().float() / B
    gates.detach()
    return total


def test_taylor_importance_ranks_units_like_closing_them(problem_of, smallest, monkeypatch):
    monkeypatch.setattr(problems, "TAYLOR_BATCHES", 1)
    monkeypatch.setattr(problems, "INTERVALS", 1)
    problem = problem_of(smallest)
    (scores,) = problems.taylor_importance(problem)
    nearly = loss_changes(problem, 0.05)
    assert spearmanr(scores, nearly).statistic > 0.95
    assert torch.allclose(nearly / 0.05, scores, rtol=0.2, atol=0.1 * scores.max().item())
    assert spearmanr(scores, loss_changes(problem, 1.0)).statistic > 0.8


def test_importance_leaves_no_hooks(problem_of, smallest):
    problems.taylor_importance(problem_of(smallest), batches=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in smallest.modules())


# ---- where logits start ----


@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 6), K=st.sampled_from((None, 1, 4)))
def test_logits_start_at_the_standardised_logarithm(seed, spread, K):
    shape = (50,) if K is None else (K, 50)
    draw = torch.Generator().manual_seed(seed)
    scores = torch.exp(spread * torch.randn(shape, generator=draw))
    logs = [torch.tensor(x).log().item() for x in scores.flatten().tolist()]
    mean = sum(logs) / len(logs)
    deviation = (sum((x - mean) ** 2 for x in logs) / (len(logs) - 1)) ** 0.5
    expected = [max(-4.0, min(4.0, 1.5 * (x - mean) / deviation)) for x in logs]
    logits = problems.importance_logits(scores)
    assert logits.shape == shape
    assert torch.allclose(logits.flatten(), torch.tensor(expected), atol=1e-3)
    scaled = problems.importance_logits(100 * scores)  # a loss in other units
    assert torch.allclose(scaled, logits, atol=1e-3)


def test_the_predictor_starts_at_the_ridge_regression_of_importance(
    problem_of, smallest, monkeypatch
):
    """Against scikit-learn's, of gradients that depend on the prompt as planted."""
    problem = problem_of(smallest)
    D, dz, rows = problem.space.size, problem.z.shape[1], torch.arange(ROWS).repeat(40)
    generator = torch.Generator().manual_seed(1)
    content = torch.eye(dz) + 0.1 * torch.randn(dz, dz, generator=generator)
    problem = dataclasses.replace(problem, content=content)
    x = (problem.z - problem.z.mean(0)) @ problem.content.T  # (ROWS, dz)
    planted = 0.02 * torch.randn(D, dz, generator=generator)
    level = torch.rand(2, D, generator=generator) + 0.5  # of two intervals of the schedule
    interval = torch.arange(len(rows)) % 2
    wanted = 1 + x[rows] @ planted.T + 0.1 * torch.randn(len(rows), D, generator=generator)
    gradient = level[interval] * wanted
    halves = [part.chunk(2) for part in (rows, interval, torch.ones(len(rows)), gradient)]
    monkeypatch.setattr(problems, "gate_gradients", lambda *_: zip(*halves, strict=True))
    b, W = problems.importance_start(problem)
    mean = torch.stack([gradient[interval == k].mean(0) for k in (0, 1)])
    relative = gradient / mean[interval] - 1
    assert relative.max() < problems.LIMIT - 1
    ridge = Ridge(alpha=problems.RIDGE).fit(x[rows].double().numpy(), relative.double().numpy())
    scale = problems.START_SPREAD / mean.sum(0).log().std()
    found = W / (problems.START_WEIGHT * scale)
    assert torch.allclose(found, torch.from_numpy(ridge.coef_).to(W), atol=1e-4)
    assert torch.allclose(b, problems.importance_logits(mean.sum(0)), atol=1e-5)
    assert torch.corrcoef(torch.stack([found.flatten(), planted.flatten()]))[0, 1] > 0.9


def test_units_without_importance_start_lowest_and_finite():
    logits = problems.importance_logits(torch.tensor([0.0, 1e-3, 1e-2, 0.0]))
    assert logits.isfinite().all() and logits[0] == logits[3] < logits[1] < logits[2]
    assert problems.importance_logits(torch.ones(5)).tolist() == [0.0] * 5


# ---- results ----


def test_a_routers_codes_are_written_as_they_meet_the_budget(problem_of, smallest, tmp_path):
    problem = problem_of(smallest, out=tmp_path)
    captions = SimpleNamespace(captions=["a giraffe"] * ROWS)
    encoder = Mock(return_value=problem.z)
    encoder.name = "none"
    problem = dataclasses.replace(problem, data=captions, validation=captions, encoder=encoder)
    router = problem.start_router()
    router.start_codes(problem.z)
    problems.write_results(problem.cfg, problem, router, {})
    codes = load_tensors(tmp_path / "codes.safetensors")[0]["codes"].float()
    shares = torch.bincount(router.route(problem.z), minlength=len(codes)) / ROWS
    expected = meet_budget(router.codes, shares, problem.macs, problem.cfg.budget)
    assert torch.equal(codes, expected)


# ---- a run's target ----


def test_a_run_whose_rows_have_changed_is_refused_in_one_line():
    settings = {"target": "emoji", "seed": 0, "limit": 12, "data_dir": None}
    assigned = {"train": [0] * 12}
    assert len(problems.load_split(settings, assigned, "train", 64)) == 12
    assigned["train"].append(1)
    with pytest.raises(UserError, match=r"emoji: 12 rows; .* 13 rows of train.*train\.py"):
        problems.load_split(settings, assigned, "train", 64)

"""Importance against weights' gradients and brute force; the start against scikit-learn."""

import copy
import dataclasses

import pytest
import torch
from conftest import ROWS
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import Tensor

import importance
import losses
from common.randomness import batch_rows, step_generator
from prune_unet import attach_gates, gated_module
from run import Setup
from teacher.model import Noised

B = 6  # rows a batch


def taylor_batch(setup: Setup, step: int) -> tuple[Tensor, Noised]:
    """The rows and the noised batch that step `step` of the importance looks at."""
    rows = batch_rows(ROWS, B, setup.cfg.seed, step)
    return rows, setup.noised(rows, step_generator(setup.cfg.seed, "taylor", step))


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
def test_taylor_importance_is_that_of_the_weights(setup_of, unet, monkeypatch, least_loss):
    """Gates' gradients against weights' gradients, a sample at a time, by interval and loss."""
    monkeypatch.setattr(importance, "TAYLOR_BATCHES", 2)
    monkeypatch.setattr(importance, "LEAST_LOSS", least_loss)
    setup = setup_of(unet, depth="all")
    trained = copy.deepcopy(unet).requires_grad_(True)
    found: dict[int, list] = {}
    for step in range(2):
        _, batch = taylor_batch(setup, step)
        for row in range(B):
            part = batch.part(torch.tensor([row]))
            trained.zero_grad()
            loss = losses.denoising_loss(trained(**part.inputs()).sample, part.target).sum()
            loss.backward()
            change = weight_sums(trained, setup.space).abs()
            found.setdefault(int(part.t) * 20 // 1000, []).append((loss.item(), change))
    mean_losses = {i: sum(x for x, _ in pairs) / len(pairs) for i, pairs in found.items()}
    counted = [i for i, x in mean_losses.items() if x > least_loss * max(mean_losses.values())]
    assert least_loss < 0.5 or 0 < len(counted) < len(found)
    expected = sum(torch.stack([g for _, g in found[i]]).mean(0) for i in counted)
    (scores,) = importance.taylor_importance(setup)
    known = ~expected.isnan()
    W = sum(layer.units for layer in setup.space.width_layers)
    assert known[:W].all() and known.sum() > W  # depth units among them
    assert torch.allclose(scores[known], expected[known].detach(), rtol=1e-3, atol=1e-6)


def test_a_micro_batch_changes_nothing(setup_of, unet, monkeypatch):
    monkeypatch.setattr(importance, "TAYLOR_BATCHES", 2)
    clusters = torch.arange(ROWS) % 3
    whole = importance.taylor_importance(setup_of(unet), clusters)
    parts = importance.taylor_importance(setup_of(unet, micro_batch=4), clusters)
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("K", [1, 3, ROWS])
def test_importance_of_a_cluster_is_that_of_its_own_samples(setup_of, smallest, monkeypatch, K):
    """By brute force: each sample's gradient alone, averaged by cluster and interval."""
    monkeypatch.setattr(importance, "INTERVALS", 2)
    monkeypatch.setattr(importance, "LEAST_LOSS", 0.0)
    setup, draw = setup_of(smallest), torch.Generator().manual_seed(1)
    clusters = torch.randint(K, (ROWS,), generator=draw)
    clusters[0] = K - 1
    gates = attach_gates(smallest, setup.space)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for step in range(3):
        rows, batch = taylor_batch(setup, step)
        for place, row in enumerate(rows.tolist()):
            part = batch.part(torch.tensor([place]))
            a = torch.ones(1, setup.space.size, requires_grad=True)
            gates.set_gates(a)
            ((smallest(**part.inputs()).sample - part.target) ** 2).mean().backward()
            cell = int(clusters[row]), int(part.t >= 500)
            found.setdefault(cell, []).append(a.grad[0].abs())
    gates.detach()
    expected = torch.zeros(K, setup.space.size)
    for (k, _), gradients in found.items():
        expected[k] += torch.stack(gradients).mean(0)
    scores = importance.taylor_importance(setup, clusters, 3)
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def loss_changes(setup, size: float) -> torch.Tensor:
    """Mean over samples of |loss without `size` of a unit - loss|, one unit at a time, (D,)."""
    unet, D = setup.teacher.unet, setup.space.size
    codes = torch.cat([torch.ones(1, D), torch.ones(D, D) - size * torch.eye(D)])  # dense first
    gates = attach_gates(unet, setup.space)
    _, batch = taylor_batch(setup, 0)
    total = torch.zeros(D)
    for row in range(B):
        part = batch.part(torch.full((D + 1,), row))
        gates.set_gates(codes)
        loss = losses.denoising_loss(unet(**part.inputs()).sample.double(), part.target.double())
        total += (loss[1:] - loss[0]).abs().float() / B
    gates.detach()
    return total


def test_taylor_importance_ranks_units_like_closing_them(setup_of, smallest, monkeypatch):
    monkeypatch.setattr(importance, "TAYLOR_BATCHES", 1)
    monkeypatch.setattr(importance, "INTERVALS", 1)
    setup = setup_of(smallest)
    (scores,) = importance.taylor_importance(setup)
    nearly = loss_changes(setup, 0.05)
    assert spearmanr(scores, nearly).statistic > 0.95
    assert torch.allclose(nearly / 0.05, scores, rtol=0.2, atol=0.1 * scores.max().item())
    assert spearmanr(scores, loss_changes(setup, 1.0)).statistic > 0.8


def test_importance_leaves_no_hooks(setup_of, smallest):
    importance.taylor_importance(setup_of(smallest), batches=1)
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
    logits = importance.importance_logits(scores)
    assert logits.shape == shape
    assert torch.allclose(logits.flatten(), torch.tensor(expected), atol=1e-3)
    scaled = importance.importance_logits(100 * scores)  # a loss in other units
    assert torch.allclose(scaled, logits, atol=1e-3)


def test_the_predictor_starts_at_the_ridge_regression_of_importance(
    setup_of, smallest, monkeypatch
):
    """Against scikit-learn's, of gradients that depend on the prompt as planted."""
    setup = setup_of(smallest)
    D, dz, rows = setup.space.size, setup.z.shape[1], torch.arange(ROWS).repeat(40)
    generator = torch.Generator().manual_seed(1)
    content = torch.eye(dz) + 0.1 * torch.randn(dz, dz, generator=generator)
    setup = dataclasses.replace(setup, content=content)
    x = (setup.z - setup.z.mean(0)) @ setup.content.T  # (ROWS, dz)
    planted = 0.02 * torch.randn(D, dz, generator=generator)
    level = torch.rand(2, D, generator=generator) + 0.5  # of two intervals of the schedule
    interval = torch.arange(len(rows)) % 2
    wanted = 1 + x[rows] @ planted.T + 0.1 * torch.randn(len(rows), D, generator=generator)
    gradient = level[interval] * wanted
    found = importance.Gradients(rows, interval, torch.ones(len(rows)), gradient)
    monkeypatch.setattr(importance, "gate_gradients", lambda *_: found)
    b, W = importance.importance_start(setup)
    mean = torch.stack([gradient[interval == k].mean(0) for k in (0, 1)])
    relative = gradient / mean[interval] - 1
    assert relative.max() < importance.MOST_RELATIVE - 1
    ridge = Ridge(alpha=importance.RIDGE).fit(x[rows].double().numpy(), relative.double().numpy())
    scale = importance.START_DEVIATION / mean.sum(0).log().std()
    found = W / (importance.START_WEIGHT * scale)
    assert torch.allclose(found, torch.from_numpy(ridge.coef_).to(W), atol=1e-4)
    assert torch.allclose(b, importance.importance_logits(mean.sum(0)), atol=1e-5)
    assert torch.corrcoef(torch.stack([found.flatten(), planted.flatten()]))[0, 1] > 0.9


def test_units_without_importance_start_lowest_and_finite():
    logits = importance.importance_logits(torch.tensor([0.0, 1e-3, 1e-2, 0.0]))
    assert logits.isfinite().all() and logits[0] == logits[3] < logits[1] < logits[2]
    assert importance.importance_logits(torch.ones(5)).tolist() == [0.0] * 5


# ---- what the others can make up for ----


@given(seed=st.integers(0, 10_000), units=st.integers(1, 5), each=st.integers(1, 3))
def test_removals_cost_what_least_squares_leaves(seed, units, each):
    """Against `lstsq`: the output that is lost when the first units are gone and the rest refitted.

    And the unit that goes is the one after which the least is lost.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(60, units * each, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(units * each, units * each, generator=draw, dtype=torch.float64)
    weight = torch.randn(4, units * each, generator=draw, dtype=torch.float64)
    gram, y = x.T @ x, x @ weight.T

    def channels(units: list[int]) -> list[int]:
        return [u * each + k for u in units for k in range(each)]

    def lost(kept: list[int]) -> float:
        if not kept:
            return y.square().sum().item()
        own = x[:, channels(kept)]
        return (own @ torch.linalg.lstsq(own, y).solution - y).square().sum().item()

    alone = [
        (x[:, c] @ weight[:, c].T).square().sum()
        for c in map(channels, ([u] for u in range(units)))
    ]
    order, costs = importance.removals(gram, weight, torch.stack(alone))
    left, before = list(range(units)), 0.0
    for u, cost in zip(order.tolist(), costs.tolist(), strict=True):
        after = {v: lost([w for w in left if w != v]) for v in left}
        near = 1e-6 * lost([])
        assert after[u] <= min(after.values()) + near
        assert cost == pytest.approx(after[u] - before, abs=near)
        before = after[u]
        left.remove(u)
    assert not left


def test_of_two_units_that_do_the_same_work_one_costs_nothing():
    gram = torch.diag(torch.tensor([4.0, 1.0, 9.0, 0.0], dtype=torch.float64))
    gram[3] = gram[2]
    gram[:, 3] = gram[:, 2]
    gram[3, 3] = 9.0
    gram.diagonal().add_(1e-9)
    weight = torch.tensor([[1.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    order, costs = importance.removals(gram, weight, torch.tensor([3.0, 2.0, 1.0, 1.0]))
    assert order[0] in (2, 3) and costs[0] == pytest.approx(0, abs=1e-6)
    found = dict(zip(order.tolist(), costs.tolist(), strict=True))
    # those that nobody can replace cost their importance; the last of the two what both are worth
    assert found[0] == pytest.approx(3) and found[1] == pytest.approx(2)
    assert max(found[2], found[3]) == pytest.approx(4)  # twice the weight, four times the square


def test_scores_are_of_the_features_that_a_layer_reads(setup_of, unet, monkeypatch):
    """The Gram matrix and the weights that are used give the layer's own output, tap by tap."""
    monkeypatch.setattr(importance, "IMAGES", B)
    monkeypatch.setattr(importance, "REFIT_RIDGE", 0.0)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(gram: Tensor, weight: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((gram.clone(), weight))
        return torch.arange(len(own)).flip(0), torch.arange(len(own)) % 3 + own.double()

    monkeypatch.setattr(importance, "removals", look)
    setup = setup_of(unet, depth="all")
    space, rows = setup.space, torch.arange(ROWS)
    given = torch.rand(space.size, generator=torch.Generator().manual_seed(0))
    scores = importance.surgeon_scores(setup, given, rows)
    assert not any(module._forward_pre_hooks for module in unet.modules())
    for layer in space.depth_layers:
        assert scores[layer.start] == given[layer.start]
    totals, hooks = {}, []
    for layer in space.width_layers:
        own = given[layer.span]
        expected = (torch.arange(len(own)) % 3 + own).cummax(0).values.flip(0)
        assert torch.allclose(scores[layer.span], expected)

        def output(module, inputs, layer=layer):
            (x,) = inputs
            taps = module.weight.flatten(2).unbind(-1) if x.ndim == 4 else [module.weight]
            x = x.movedim(1, -1) if x.ndim == 4 else x
            totals[layer.name] = sum((x.double() @ w.T.double()).square().sum() for w in taps)

        hooks.append(gated_module(unet, layer)[0].register_forward_pre_hook(output))
    pick = rows[batch_rows(ROWS, B, setup.cfg.seed, 0)]
    parts = pick.split(setup.cfg.micro_batch)
    sums = dict.fromkeys((layer.name for layer in space.width_layers), 0.0)
    for step, part in enumerate(parts):
        unet(**setup.noised(part, step_generator(setup.cfg.seed, "surgeon", step)).inputs())
        sums = {name: sums[name] + totals[name].item() for name in sums}
    for hook in hooks:
        hook.remove()
    for (gram, weight), total in zip(seen, sums.values(), strict=True):
        assert ((weight @ gram) * weight).sum().item() == pytest.approx(total, rel=1e-5)

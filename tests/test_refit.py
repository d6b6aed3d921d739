"""Refitting against least squares, layer by layer, and the expert that comes of it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refit
from bench.plan import refit_costs
from gates import binarize, removed_layers
from prune_unet import cut_expert, find_units, gated_module, gated_path, stream_module

IMAGES, RIDGE = 24, 0.03


@pytest.fixture(scope="module")
def inputs(unet, make_inputs):
    return make_inputs(unet, IMAGES, seed=4)


def code_of(space, threshold=0.0, seed=0):
    logits = torch.randn(space.size, generator=torch.Generator().manual_seed(seed))
    return binarize(logits, space, threshold=threshold)


def refitted(unet, code, space, weights):
    expert = cut_expert(unet, code, space)
    left = expert.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    return expert


class Reached(Exception):
    pass


def seen(unet, layer, inputs):
    """What a layer's reading module is given and puts out, and the residual stream before it."""
    found, module = {}, gated_module(unet, layer)[0]

    def stream(_, given):
        found["stream"] = given[0]

    def stop(_, given, output):
        found.update(x=given[0], y=output)
        raise Reached

    hooks = [
        stream_module(unet, layer).register_forward_pre_hook(stream),
        module.register_forward_hook(stop),
    ]
    with pytest.raises(Reached), torch.no_grad():
        unet(**inputs)
    for hook in hooks:
        hook.remove()
    shortcut = getattr(unet.get_submodule(layer.name), "conv_shortcut", None)
    stream = found["stream"] if shortcut is None else shortcut(found["stream"])
    if stream.ndim > found["y"].ndim:
        stream = stream.flatten(2).transpose(1, 2)
    return found["x"], found["y"], stream


def rows(x):
    return (x.flatten(2).transpose(1, 2) if x.ndim == 4 else x).flatten(0, -2).double()


@pytest.mark.parametrize("kind", ["resnet", "attention", "feedforward"])
def test_a_layer_is_the_least_squares_solution_where_the_forward_has_come_to(
    unet, inputs, kind, monkeypatch
):
    """The last layer of each kind, in a cut expert with all refitted layers before it."""
    monkeypatch.setattr(refit.Fit, "gains", True)  # with random weights, some would not
    space = find_units(unet)
    layers = [layer for layer in space.width_layers if layer.kind == kind]
    if not layers:
        pytest.skip("this U-Net has none")
    code = code_of(space, -0.2)
    weights, fits = refit.refit(unet, space, code, inputs, RIDGE)
    order = [fit.layer for fit in fits]
    layer = max((x for x in layers if x.name in order), key=lambda x: order.index(x.name))
    name = f"{gated_path(layer)}.weight"
    before = {
        f"{n}.{p}"
        for n in order[: order.index(layer.name)]
        for p in ("conv2.weight", "to_out.0.weight", "net.2.weight")
    }
    expert = refitted(unet, code, space, {k: w for k, w in weights.items() if k in before})
    _, y, stream = seen(unet, layer, inputs)
    x, _, own = seen(expert, layer, inputs)
    module = expert.get_submodule(gated_path(layer))
    bias = 0 if module.bias is None else module.bias
    target = rows((y + stream - own)[IMAGES // 8 :]) - bias
    x = x[IMAGES // 8 :]
    X = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double() if x.ndim == 4 else rows(x)
    old = module.weight.flatten(1).double()
    weight = math.sqrt(RIDGE * X.square().sum(0).mean().item())
    A = torch.cat([X, weight * torch.eye(X.shape[1], dtype=torch.float64)])
    b = torch.cat([target, weight * old.T])
    oracle = torch.linalg.lstsq(A, b).solution.T
    assert torch.allclose(
        weights[name].flatten(1).double(), oracle, atol=1e-4 * oracle.abs().max().item()
    )


def test_with_nothing_cut_the_weights_come_back(unet, inputs):
    space = find_units(unet)
    weights, fits = refit.refit(unet, space, torch.ones(space.size), inputs, RIDGE)
    for name, new in weights.items():
        old = unet.get_parameter(name)
        assert torch.allclose(new, old, atol=1e-5 * max(1, old.abs().max().item())), name
    assert len(fits) == len(space.width_layers)


@pytest.mark.parametrize("threshold", [-0.5, 0.5, 9.0])  # the last leaves one unit of each layer
def test_the_expert_computes_what_its_half_of_the_forward_did(unet, inputs, threshold):
    space = find_units(unet, "all")
    code, ends = code_of(space, threshold), []
    hook = unet.register_forward_hook(lambda _, __, output: ends.append(output.sample))
    with torch.no_grad():
        wanted = unet(**inputs).sample
    weights, _ = refit.refit(unet, space, code, inputs, RIDGE)
    hook.remove()
    teacher, half = ends[1].chunk(2)
    expert = refitted(unet, code, space, weights)
    with torch.no_grad():
        own, cut = (m(**inputs).sample for m in (expert, cut_expert(unet, code, space)))
    assert torch.allclose(teacher, wanted, atol=1e-5)
    assert torch.allclose(own, half, atol=1e-3 * half.abs().max().item())
    assert removed_layers(code, space) or threshold < 0
    if threshold < 0:  # of a network with random weights, little more can be made up for
        assert (own - wanted).square().mean() < 0.8 * (cut - wanted).square().mean()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_copies_of_kept_channels_are_recovered_exactly(kind):
    """Channels 4 to 7 are what 0 to 3 are: the kept ones take over their weights."""
    draw = torch.Generator().manual_seed(0)
    if kind == "linear":
        module, x = nn.Linear(8, 5, bias=False), torch.randn(64, 3, 4, generator=draw)
        full = torch.cat([x, x], -1)
    else:
        module, x = (
            nn.Conv2d(8, 5, 3, padding=1, bias=False),
            torch.randn(16, 4, 6, 6, generator=draw),
        )
        full = torch.cat([x, x], 1)
    target, old = module(full).detach(), module.weight.detach()
    new, (before, after) = refit.solved(module, x, target, old[:, :4], 1e-9)
    assert torch.allclose(new, old[:, :4] + old[:, 4:], atol=1e-5)
    assert after < 1e-10 < before


def test_chunks_of_images_add_up(monkeypatch):
    module, x = nn.Conv2d(4, 5, 3, padding=1), torch.randn(17, 3, 6, 6)
    target, old = torch.randn(17, 5, 6, 6), module.weight.detach()[:, :3]
    whole = refit.solved(module, x, target, old, RIDGE)
    monkeypatch.setattr(refit, "CHUNK", 1)
    parts = refit.solved(module, x, target, old, RIDGE)
    assert torch.allclose(whole[0], parts[0], atol=1e-6)
    assert whole[1] == pytest.approx(parts[1])


def test_a_layer_that_does_not_gain_keeps_its_weights():
    """Features of zeros have no solution; two images to fit noise with gain nothing elsewhere."""
    module, draw = nn.Linear(40, 6), torch.Generator().manual_seed(0)
    old = module.weight.detach()
    _, errors = refit.solved(module, torch.zeros(16, 3, 40), torch.ones(16, 3, 6), old, RIDGE)
    assert not refit.Fit("zeros", *errors).gains
    x = torch.randn(9, 3, 40, generator=draw)
    target = F.linear(x, old)
    target[1:] += 5 * torch.randn(8, 3, 6, generator=draw)
    _, errors = refit.solved(module, x, target, old, 1e-3)
    assert not refit.Fit("noise", *errors).gains


def test_the_plan_says_what_the_sums_over_rows_cost(smallest, make_inputs, monkeypatch):
    """Of a real refit with nothing cut: MACs of X^T X and X^T R, their size, the new weights'."""
    sums, rows_of = [], refit.rows_of

    def counted(*arguments):
        for x, r in rows_of(*arguments):
            sums.append((len(x) * x.shape[1] * (x.shape[1] + r.shape[1]), 2 * 4 * x.shape[1] ** 2))
            yield x, r

    monkeypatch.setattr(refit, "rows_of", counted)
    monkeypatch.setattr(refit.Fit, "gains", True)
    space = find_units(smallest)
    inputs = make_inputs(smallest, 1)
    weights, _ = refit.refit(smallest, space, torch.ones(space.size), inputs)
    macs, _, largest, new = refit_costs(smallest, space, 8, 5, share=1.0)
    assert 2 * macs == sum(count for count, _ in sums) > 0  # once summed, once compared
    assert largest == max(size for _, size in sums)
    assert new == 4 * sum(weight.numel() for weight in weights.values())

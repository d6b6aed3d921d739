"""Baselines: scores against brute force, budgets, BK-SDM's list against its published U-Nets."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import baselines
from baselines import METHODS
from common.randomness import batch_rows, step_generator
from gates import gumbel_noise, inside
from macs import measure_macs
from prune_unet import (
    BlockRecorder,
    attach_gates,
    check_code,
    cut_expert,
    cut_in_place,
    find_units,
    gated_module,
    meta_copy,
)
from run import Setup, final_codes
from teacher.shapes import ASSETS, load_shape

SHARES = st.floats(0, 1)  # of the way from the smallest expert to the dense model


@pytest.fixture(scope="module")
def pocket():
    return UNet2DConditionModel.from_pretrained(ASSETS / "pocket" / "unet").eval()


def sizes(unet: nn.Module, name: str) -> tuple[float, int]:
    """L1 norm and number of the weights under a name."""
    weights = [w.double() for key, w in unet.named_parameters() if key.startswith(name)]
    return sum(w.abs().sum().item() for w in weights), sum(w.numel() for w in weights)


def code_of(method: str, setup: Setup) -> torch.Tensor:
    """The code of a method that has one, (1, D)."""
    return final_codes(setup, METHODS[method](setup, setup.start_router()), torch.ones(1))[0]


# ---- budgets and codes ----


def check_met(macs, code: torch.Tensor, budget: float, *, coarse: bool = False) -> None:
    """At most the budget, and 1 % below it at most; or a unit, where `coarse` units cost more."""
    used = macs(code).item() / macs.dense
    layers = macs.space.width_layers
    opened = torch.ones(len(layers), macs.space.size)
    opened[range(len(layers)), [layer.start for layer in layers]] = 0
    unit = 1 - macs(opened).min().item() / macs.dense
    assert budget - max(0.01 * budget, coarse * unit) <= used <= budget + 1e-7


@pytest.mark.parametrize("method", ["norm", "random", "bksdm"])
@given(share=SHARES)
@settings(max_examples=6)
def test_codes_meet_the_budget_to_one_percent(setup_of, unet, method, share):
    depth = baselines.DEPTHS.get(method, "paper")
    macs = setup_of(unet, depth=depth).macs
    floor = macs.floor / macs.dense
    budget = min(1.0, floor * (1 + 1e-6) + share * (1 - floor))
    code = code_of(method, setup_of(unet, budget, depth))
    assert code.shape == (1, macs.space.size) and code.dtype == torch.float32
    check_met(macs, code, budget, coarse=method == "bksdm")
    check_code(code[0], macs.space)  # it can be cut


@pytest.mark.parametrize("method", ["sp", "obs", "uni-arch"])
@pytest.mark.parametrize("budget", [0.85, 0.6])
def test_codes_made_from_data_meet_the_budget(setup_of, unet, monkeypatch, method, budget):
    monkeypatch.setattr("importance.TAYLOR_BATCHES", 1)
    monkeypatch.setattr("importance.IMAGES", 8)
    setup = setup_of(unet, budget)
    check_met(setup.macs, code_of(method, setup), budget)


def test_random_is_a_function_of_the_seed(setup_of, unet):
    codes = [code_of("random", setup_of(unet, seed=seed))[0] for seed in (0, 1, 2)]
    assert torch.equal(codes[1], code_of("random", setup_of(unet, seed=1))[0])
    for other in (codes[0], codes[2]):
        assert 0.1 < (codes[1] != other).float().mean() < 0.9


# ---- norm ----


@pytest.mark.parametrize("place", [0, 1, -1])
def test_norms_are_of_the_weights_that_vanish(unet, place):
    """Cut one unit out of every layer: its norm is what the layer then lacks."""
    space = find_units(unet, "none")
    code = torch.ones(space.size)
    for layer in space.layers:
        code[layer.span][place % layer.units] = layer.units == 1
    expert = cut_expert(unet, code, space)
    for layer in space.layers:
        norms = baselines.unit_norms(unet, layer)
        assert norms.shape == (layer.units,)
        if layer.units > 1:
            gone = sizes(unet, layer.name + ".")[0] - sizes(expert, layer.name + ".")[0]
            assert norms[place].item() == pytest.approx(gone, rel=1e-5)


def test_norms_are_relative_to_a_layer_and_to_a_kind_of_layer(unet):
    space = find_units(unet, "all")
    scores = baselines.relative_norms(unet, space)
    for layer in space.width_layers:
        norms = baselines.unit_norms(unet, layer)
        expected = norms * layer.units / norms.sum()
        assert torch.allclose(scores[layer.span], expected, rtol=1e-5)
    for kind in ("resnets", "attentions"):
        layers = [layer for layer in space.depth_layers if f".{kind}." in layer.name]
        of_layers = [sizes(unet, layer.name + ".") for layer in layers]
        means = torch.tensor([norm / number for norm, number in of_layers])
        found = scores[[layer.start for layer in layers]]
        assert torch.allclose(found, means / means.mean(), rtol=1e-5)


# ---- sp ----


def test_units_that_do_nothing_are_closed_first(setup_of, unet, monkeypatch):
    """Where the budget is just what the other units cost, `sp` finds those exactly."""
    monkeypatch.setattr("importance.TAYLOR_BATCHES", 1)
    broken = copy.deepcopy(unet)
    space = find_units(broken)
    alive = torch.ones(space.size)
    for layer in space.width_layers:
        module, width = gated_module(broken, layer)
        half = torch.arange(layer.units) % 2 == 1
        alive[layer.span][half] = 0
        module.weight[:, half.repeat_interleave(width // layer.units)] = 0
    macs = setup_of(broken).macs
    budget = macs(alive).item() / macs.dense
    assert torch.equal(code_of("sp", setup_of(broken, budget))[0], alive)
    kept = code_of("norm", setup_of(broken, budget))[0]
    assert (kept == alive).float().mean() > 0.8  # dead columns are part of a unit's norm


# ---- routed-sp and routed-obs ----


@pytest.mark.parametrize("method", ["routed-sp", "routed-obs"])
@pytest.mark.parametrize("budget", [0.85, 0.6])
def test_budget_is_met_over_the_clusters(setup_of, smallest, monkeypatch, budget, method):
    monkeypatch.setattr(baselines, "ROUTED_BATCHES", 6)
    monkeypatch.setattr("importance.IMAGES", 8)
    setup = setup_of(smallest, budget)
    router = setup.start_router()
    scores = METHODS[method](setup, router)
    N = setup.cfg.num_experts
    routed = torch.bincount(router.route(setup.z), minlength=N)
    assert (routed > 0).all()  # balanced clusters, which the router sends prompts to
    shares = routed / routed.sum()
    codes, _, _ = final_codes(setup, scores, shares)
    assert codes.shape == (N, setup.space.size) and len(codes.unique(dim=0)) == N
    used = shares.double() @ setup.macs(codes) / setup.macs.dense
    assert 0.99 * budget <= used.item() <= budget + 1e-7
    for code in codes:
        check_code(code, setup.space)


# ---- bksdm ----

PAIR = ("resnets", "attentions")
SD15_ORDER = [  # Base from the innermost stage outwards, Small, what Tiny adds
    ["down_blocks.3.resnets.1"],
    ["up_blocks.0.resnets.1"],
    *[
        [f"{side}_blocks.{stage}.{kind}.1" for kind in PAIR]
        for side, stage in (("down", 2), ("up", 1), ("down", 1), ("up", 2), ("down", 0), ("up", 3))
    ],
    ["mid_block.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"],
    ["down_blocks.3.resnets.0"],
    ["up_blocks.0.resnets.0"],
    ["up_blocks.0.resnets.2"],
]


def published(unet: UNet2DConditionModel, size: str) -> UNet2DConditionModel:
    """BK-SDM's U-Net as its authors configure it: a pair a stage less, and no middle in Small."""
    change = {"layers_per_block": unet.config.layers_per_block - 1}
    if size == "small":
        change["mid_block_type"] = None
    with torch.device("meta"):
        return UNet2DConditionModel.from_config({**unet.config, **change}).eval()


def in_teacher(name: str) -> str:
    """A published U-Net's parameter in the dense one: of three pairs the first and last are left"""
    for kind in PAIR:
        side, _, rest = name.partition(f".{kind}.1.")
        if side.startswith("up_blocks") and rest:
            return f"{side}.{kind}.2.{rest}"
    return name


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_order_of_removal(name):
    space = find_units(load_shape(name), "all")
    order = baselines.removal_order(space)
    assert [sorted(block) for block in order] == [sorted(block) for block in SD15_ORDER]


@pytest.mark.parametrize(("size", "blocks"), [("base", 8), ("small", 9)])
def test_published_sizes_on_stable_diffusion(size, blocks):
    """MACs and parameters are those of the authors' configurations."""
    unet = load_shape("sd15")
    macs = measure_macs(unet, find_units(unet, "all"), latent_size=64)
    theirs = published(unet, size)
    budget = measure_macs(theirs, latent_size=64).dense / macs.dense
    removed, following = baselines.blocks_to_remove(macs, budget)
    assert sorted(removed) == sorted(name for block in SD15_ORDER[:blocks] for name in block)
    assert sorted(following) == sorted(SD15_ORDER[blocks])
    code = torch.ones(macs.space.size)
    code[[layer.start for layer in macs.space.depth_layers if layer.name in removed]] = 0
    assert macs(code).item() == round(budget * macs.dense)
    expert = meta_copy(unet)
    cut_in_place(expert, macs.space, code)
    count = [sum(w.numel() for w in part.parameters()) for part in (expert, theirs)]
    assert count[0] == count[1]
    # a budget a little lower goes on to the next block, a little higher keeps the last one
    assert baselines.blocks_to_remove(macs, budget - 1e-4) == (removed, following)
    assert baselines.blocks_to_remove(macs, budget + 1e-4)[1] == SD15_ORDER[blocks - 1]


@pytest.mark.parametrize("size", ["base", "small"])
def test_at_a_published_size_the_expert_is_the_published_unet(setup_of, pocket, make_inputs, size):
    unet = published(pocket, size)
    setup = setup_of(pocket, depth="all")
    budget = measure_macs(unet, latent_size=8, text_tokens=5).dense / setup.macs.dense
    code = code_of("bksdm", setup_of(pocket, budget, "all"))[0]
    weights = pocket.state_dict()
    unet.load_state_dict(
        {name: weights[in_teacher(name)] for name in unet.state_dict()}, assign=True
    )
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, pocket.config.in_channels, 8, 8, generator=draw),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 384, generator=draw),
    }
    with torch.no_grad():
        expected = unet(**inputs).sample
        found = cut_expert(pocket, code, setup.space)(**inputs).sample
        dense = pocket(**inputs).sample
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)


@given(share=SHARES)
@settings(max_examples=20)
def test_blocks_go_in_order_and_the_next_one_is_thinned_first(setup_of, pocket, share):
    setup = setup_of(pocket, 0.45 + 0.55 * share, "all")
    code = code_of("bksdm", setup)[0]
    gone = [layer.name for layer in setup.space.depth_layers if code[layer.start] == 0]
    order = baselines.removal_order(setup.space)
    count = sum(set(block) <= set(gone) for block in order)
    assert sorted(gone) == sorted(name for block in order[:count] for name in block)
    following = order[count] if count < len(order) else []
    stump, elsewhere = code.clone(), 0.0  # the next block at its narrowest
    for layer in setup.space.width_layers:
        if inside(layer, following):
            stump[layer.span] = 0
            stump[layer.start] = 1
        elif not inside(layer, gone):
            closed = (code[layer.span] == 0).nonzero().flatten() + layer.start
            for unit in closed.tolist():
                opened = code.clone()
                opened[unit] = 1
                elsewhere = max(elsewhere, (setup.macs(opened) - setup.macs(code)).item())
    if elsewhere:  # then no more is left of the next block than what fits beside such a unit
        assert (setup.macs(code) - setup.macs(stump)).item() < elsewhere


def test_bksdm_asks_for_a_space_that_names_its_blocks(setup_of, unet):
    with pytest.raises(ValueError, match='depth "all"'):
        code_of("bksdm", setup_of(unet, 0.7, "paper"))


# ---- uni-arch ----


def test_uni_arch_is_a_function_of_the_seed(setup_of, smallest, monkeypatch):
    monkeypatch.setattr("importance.TAYLOR_BATCHES", 1)
    logits = []
    for seed in (0, 0, 1):
        setup = setup_of(smallest, seed=seed)
        logits.append(METHODS["uni-arch"](setup, setup.start_router()))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    for module in smallest.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_step_of_uni_arch_goes_down_its_loss(setup_of, unet):
    """AdamW's first step is lr times the gradient's sign; the gradient from one expression."""
    settings = {"warmup_steps": 0, "joint_steps": 1, "lr_warmup": 0, "open_logit": 0.5, "seed": 3}
    settings |= {"block_weight": 0.2}
    setup = setup_of(unet, hold_budget=False, importance_start=False, **settings)
    cfg, space = setup.cfg, setup.space
    draw = step_generator(cfg.seed, "train", 0)
    rows = batch_rows(len(setup.z), 6, cfg.seed, 0)
    batch = setup.noised(rows, draw)
    code = torch.full((1, space.size), cfg.open_logit, requires_grad=True)
    noise = gumbel_noise((6, space.size), generator=draw)
    a = torch.sigmoid((code + noise) / cfg.gumbel_temp)
    recorder, gates = BlockRecorder(unet), attach_gates(unet, space)
    expected, blocks = unet(**batch.inputs()).sample, recorder.take()
    gates.set_gates(a)
    output = unet(**batch.inputs()).sample
    gates.detach()
    distillation = (output - expected).square().mean()
    for ours, theirs in zip(recorder.take(), blocks, strict=True):
        errors, sizes = (x.square().flatten(1).mean(1) for x in (ours - theirs, theirs))
        distillation = distillation + cfg.block_weight * (errors / sizes).mean() / len(blocks)
    recorder.detach()
    resource = (setup.macs(a).mean() / (cfg.budget * setup.macs.dense)).log().abs()
    image = (output - batch.target).square().mean() + cfg.lambda_distill * distillation
    (gradient,) = torch.autograd.grad(image + cfg.lambda_res * resource, code)
    logits = METHODS["uni-arch"](setup, setup.start_router())[0]
    moved = logits - cfg.open_logit * (1 - 0.01 * cfg.lr)  # AdamW's decay
    sure = gradient[0].abs() > 1e-5
    assert sure.float().mean() > 0.8
    assert torch.allclose(moved[sure], -cfg.lr * gradient[0, sure].sign(), rtol=1e-2)


def test_routed_uni_has_uni_archs_code_and_routed_sps_clusters(setup_of, smallest, monkeypatch):
    monkeypatch.setattr("importance.TAYLOR_BATCHES", 1)
    monkeypatch.setattr(baselines, "ROUTED_BATCHES", 2)
    setup = setup_of(smallest)
    routers = {name: setup.start_router() for name in ("routed-uni", "routed-sp")}
    scores = {name: METHODS[name](setup, router) for name, router in routers.items()}
    codes, _, _ = final_codes(setup, scores["routed-uni"], torch.tensor([0.5, 0.3, 0.2]))
    assert torch.equal(codes, code_of("uni-arch", setup).expand(3, -1))
    clusters = [router.route(setup.z) for router in routers.values()]
    assert torch.equal(*clusters) and len(clusters[0].unique()) == 3

"""Prices of codes and codes that meet a budget."""

import re

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.units import paper_macs
from common.errors import UserError
from gates import binarize
from macs import budget_shift, check_budget, measure_macs, meet_budget
from prune_unet import cut_in_place, find_units, meta_copy
from teacher.shapes import load_shape

SEEDS = st.integers(0, 2**31)
aten = torch.ops.aten


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def price(unet):
    return measure_macs(unet, find_units(unet, "all"), latent_size=8, text_tokens=5)


# ---- T(a) ----


@pytest.mark.parametrize(("pixels", "giga"), [(768, 1074.55), (512, 402.13), (256, 90.55)])
def test_sd21_costs_what_the_counter_says(pixels, giga):
    macs = measure_macs(load_shape("sd21"), latent_size=pixels // 8)
    assert round(macs.dense / 1e9, 2) == giga


@given(seed=SEEDS)
def test_the_derivative_of_a_gate_is_what_its_unit_costs(price, seed):
    code = random(price.space.size, seed=seed).double().requires_grad_()
    price(code).backward()
    unit = seed % price.space.size
    closed, opened = code.detach().clone(), code.detach().clone()
    closed[unit], opened[unit] = 0, 1
    cost = (price(opened) - price(closed)).item()
    assert code.grad[unit].item() == pytest.approx(cost, rel=1e-9)
    assert cost >= 0


@given(seed=SEEDS)
def test_soft_gates_cost_their_mean(price, seed):
    """A layer of gates with mean r costs as much as the mix r dense + (1 - r) empty."""
    code = random(price.space.size, seed=seed).double()
    layer = price.space.width_layers[seed % len(price.space.width_layers)]
    full, empty = code.clone(), code.clone()
    full[layer.span], empty[layer.span] = 1, 0
    r = code[layer.span].mean()
    mix = r * price(full) + (1 - r) * price(empty)
    assert price(code).item() == pytest.approx(mix.item(), rel=1e-9)


@given(seed=SEEDS, share=st.floats(0, 1))
def test_no_code_is_below_the_floor_or_above_the_dense_model(price, seed, share):
    code = binarize(share - random(price.space.size, seed=seed), price.space)
    assert price.floor <= price(code).item() <= price.dense


# ---- the paper's convention ----


def test_paper_convention_gives_the_papers_figure():
    assert abs(paper_macs(load_shape("sd21"), latent_size=96) / 1384.2e9 - 1) < 0.002


def numel(shape) -> int:
    return torch.Size(shape).numel()


def elementwise(*shapes, out_shape=None, **options):
    return 2 * numel(out_shape)


def norm(features, *shapes, **options):
    return 2 * numel(features)


def convolution(features, weight, bias, *options, out_shape=None, **more):
    return 2 * numel(out_shape) * (numel(weight[1:]) + (bias is not None))


def addmm(bias, left, right, out_shape=None, **options):
    return 2 * numel(out_shape) * (left[1] + 1)


def test_paper_convention_equals_a_count_of_the_operations_that_run(unet, make_inputs):
    """The same count at the level of aten operations, on real tensors, S x S added by hand."""
    operations = {
        aten.native_group_norm: norm,
        aten.native_layer_norm: norm,
        aten.silu: elementwise,
        aten.gelu: elementwise,
        aten._softmax: elementwise,
        aten.convolution: convolution,
        aten.addmm: addmm,
    }
    expert = meta_copy(unet).to_empty(device="cpu")
    expert.set_attn_processor(AttnProcessor())
    inputs = make_inputs(unet, 1)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :1]
    missing = 0

    def square(module, args, output):
        nonlocal missing
        if module.is_cross_attention:
            S = args[0].shape[1]
            missing += (2 * module.inner_dim + module.heads) * S * (S - 1)

    for module in expert.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(square)
        elif isinstance(
            module, nn.Linear
        ):  # one addmm, where a strided input would give mm and add
            module.register_forward_pre_hook(lambda module, args: args[0].contiguous())
    with FlopCounterMode(display=False, custom_mapping=operations) as counter, torch.no_grad():
        expert(**inputs)
    counted = counter.get_total_flops() // 2 + missing
    assert paper_macs(meta_copy(unet), latent_size=8) == counted


def test_paper_convention_counts_an_expert_as_it_is_and_leaves_no_hooks(unet):
    expert = meta_copy(unet)
    space = find_units(unet)
    cut_in_place(expert, space, binarize(torch.zeros(space.size), space))
    assert 0 < paper_macs(expert, latent_size=8) < paper_macs(meta_copy(unet), latent_size=8)
    assert not any(module._forward_hooks for module in expert.modules())


# ---- budgets ----


@given(
    seed=SEEDS,
    B=st.integers(1, 6),
    spread=st.floats(0, 10),
    centre=st.floats(-20, 20),
    budget=st.floats(0.3, 0.99),
    gumbel_temp=st.floats(0.1, 1),
)
@settings(max_examples=40)
def test_shifted_logits_cost_the_budget(price, seed, B, spread, centre, budget, gumbel_temp):
    """Soft gates, mean over the batch, whatever the logits and how far they are from it."""
    draw = torch.Generator().manual_seed(seed)
    logits = centre + spread * torch.randn(B, price.space.size, generator=draw)
    closed = price(torch.zeros(price.space.size)).item() / price.dense
    budget = max(budget, closed + 0.01)
    shift = budget_shift(logits, gumbel_temp, price, budget * price.dense)
    a = 1 / (1 + torch.exp(-(logits.double() + shift) / gumbel_temp))
    assert price(a).mean().item() / price.dense == pytest.approx(budget, rel=1e-5)


@pytest.fixture(scope="module", params=["pocket", "sd21"])
def real(request):
    unet = load_shape(request.param)
    return measure_macs(unet, latent_size=unet.config.sample_size)


@given(
    seed=SEEDS,
    N=st.integers(1, 4),
    tightness=st.floats(0.02, 1),
    spread=st.sampled_from((0.0, 0.01, 1.0)),
    depth_bias=st.sampled_from((-5.0, 0.0, 5.0)),
)
@settings(max_examples=15)
def test_codes_meet_the_budget_to_one_percent(real, seed, N, tightness, spread, depth_bias):
    floor = real.floor / real.dense
    budget = floor + tightness * (1 - floor)
    shares = random(N, seed=seed)
    shares = shares / shares.sum()
    logits = 2 + spread * random(N, real.space.size, seed=seed + 1)
    for layer in real.space.depth_layers:
        logits[:, layer.start] += depth_bias
    codes = meet_budget(logits, shares, real, budget)
    assert ((codes == 0) | (codes == 1)).all() and codes.shape == logits.shape
    assert all(codes[:, layer.span].any(1).all() for layer in real.space.width_layers)
    used = float(shares.double() @ real(codes)) / real.dense
    assert budget * 0.99 <= used <= budget + 1e-7


def test_units_with_low_logits_go_first(real):
    logits = random(1, real.space.size, seed=0)
    codes = meet_budget(logits, torch.ones(1), real, 0.7)
    for layer in real.space.width_layers:
        kept, gone = logits[:, layer.span][codes[:, layer.span] == 1], codes[:, layer.span] == 0
        if gone.any():
            assert logits[:, layer.span][gone].max() < kept.max()
    closed = (codes == 0).sum()
    assert (codes[logits < logits.flatten().sort().values[closed // 2]] == 0).float().mean() > 0.8


def test_whole_budget_keeps_everything_and_the_floor_is_reached(real):
    logits, shares = random(3, real.space.size, seed=0), torch.full((3,), 1 / 3)
    assert (meet_budget(logits, shares, real, 1.0) == 1).all()
    floor = real.floor / real.dense
    codes = meet_budget(logits, shares, real, floor * (1 + 1e-6))
    assert (real(codes) == real.floor).all()


def test_a_whole_layer_does_not_go_for_a_part_of_its_cost(real):
    """Its logit is the lowest, but the budget asks for half of what it costs."""
    opened = torch.ones(real.space.size)
    saving = {}
    for layer in real.space.depth_layers:
        code = opened.clone()
        code[layer.start] = 0
        saving[layer] = 1 - real(code).item() / real.dense
    costliest = max(saving, key=saving.__getitem__)
    assert saving[costliest] > 0.03
    logits = random(1, real.space.size, seed=0)
    logits[0, costliest.start] = -1
    budget = 1 - saving[costliest] / 2
    codes = meet_budget(logits, torch.ones(1), real, budget)
    assert codes[0, costliest.start] == 1
    assert 0.99 * budget <= real(codes).item() / real.dense <= budget


def test_what_has_a_logit_of_minus_infinity_stays_closed(real):
    """Though all that is left fits into the budget, and no other layer is kept open instead."""
    logits = random(2, real.space.size, seed=0)
    gone = [layer.start for layer in real.space.depth_layers][::2]
    logits[:, gone] = -torch.inf
    codes = meet_budget(logits, torch.ones(2), real, 1.0)
    assert (codes[:, gone] == 0).all() and codes.sum() == codes.numel() - 2 * len(gone)


def test_other_savings_leave_the_dense_model_as_it_is(real):
    codes = binarize(random(5, real.space.size, seed=0) - 0.5, real.space)
    other = real.with_savings(0.3)
    assert other.dense == pytest.approx(real.dense)
    saved, less = real.dense - real(codes), other.dense - other(codes)
    assert torch.allclose(less, 0.3 * saved) and saved.min() > 0.1 * real.dense


def test_an_expert_without_prompts_is_pruned_like_the_others(real):
    """It costs nothing, yet what the others cannot have back stays closed in it too."""
    logits = random(1, real.space.size, seed=0).repeat(2, 1)
    codes = meet_budget(logits, torch.tensor([1.0, 0.0]), real, 0.7)
    assert (codes[1] <= codes[0]).all()
    assert (codes[1] != codes[0]).float().mean() < 0.02


def test_a_budget_that_cannot_be_met_names_the_floor(real):
    floor = real.floor / real.dense
    with pytest.raises(UserError, match=re.escape(f"{floor:.3f}")):
        meet_budget(torch.zeros(1, real.space.size), torch.ones(1), real, floor - 0.01)
    for budget in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(UserError, match=re.escape("(0, 1]")):
            check_budget(budget, real)
    check_budget(1.0, real)


def test_shares_that_do_not_go_with_the_codes_are_refused(real):
    codes = torch.zeros(2, real.space.size)
    for shares in (torch.ones(3), torch.zeros(2)):
        with pytest.raises(ValueError, match="shares"):
            meet_budget(codes, shares, real, 0.9)

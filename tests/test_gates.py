"""The architecture space of published U-Nets, Gumbel-sigmoid gates, binary codes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gates import binarize, gumbel_noise, gumbel_sigmoid
from prune_unet import find_units
from teacher.shapes import load_shape

SEEDS = st.integers(0, 2**31)

# ---- the space ----

# groups (32 a ResBlock), heads and feed-forward slices (32 a transformer block) by hand:
# SD: 22 ResBlocks, 16 transformer blocks, 2 attentions each. SDXL: 17 ResBlocks, 70 blocks.
UNITS = {
    "sd15": (22 * 32, 32 * 8, 16 * 32, 14),
    "sd21-base": (22 * 32, 2 * (5 * (5 + 10 + 20) + 20), 16 * 32, 14),
    "sd21": (22 * 32, 2 * (5 * (5 + 10 + 20) + 20), 16 * 32, 14),
    "sdxl": (17 * 32, 2 * (10 * (2 * 2 + 3 * 2) + 20 * (2 * 10 + 3 * 10 + 10)), 70 * 32, 10),
    "pocket": (17 * 32, 2 * (5 * (2 + 4) + 6), 11 * 32, 10),
}
PARAMETERS = {
    "sd15": 859_520_964,
    "sd21-base": 865_910_724,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "pocket": 13_215_760,
}


@pytest.fixture(scope="module", params=UNITS)
def published(request):
    return request.param, load_shape(request.param)


def test_units_of_published_unets(published):
    name, unet = published
    space = find_units(unet)
    kinds = ("resnet", "attention", "feedforward", "depth")
    assert tuple(space.count(kind) for kind in kinds) == UNITS[name]
    assert space.size == sum(UNITS[name])
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[name]


def test_layers_tile_the_code_and_name_real_modules(published):
    _, unet = published
    for depth in ("paper", "all", "none"):
        space = find_units(unet, depth)
        end = 0
        for layer in space.layers:
            assert layer.start == end and layer.units > 0
            unet.get_submodule(layer.name)
            end = layer.span.stop
        assert end == space.size
        assert [layer.kind == "depth" for layer in space.layers] == sorted(
            layer.kind == "depth" for layer in space.layers
        )


def test_paper_depth_of_sd21_is_the_last_layer_of_each_kind_of_each_outer_block():
    names = [layer.name for layer in find_units(load_shape("sd21")).depth_layers]
    down = [f"down_blocks.{i}.resnets.1" for i in range(4)]
    down += [f"down_blocks.{i}.attentions.1" for i in range(3)]
    up = [f"up_blocks.{i}.resnets.2" for i in range(4)]
    up += [f"up_blocks.{i}.attentions.2" for i in range(1, 4)]
    assert sorted(names) == sorted(down + up)


def test_all_depth_adds_every_layer_that_keeps_the_shape():
    unet = load_shape("sd21")
    names = {layer.name for layer in find_units(unet, "all").depth_layers}
    # 16 Transformers; of 22 ResBlocks, all but those that change the channels on their way
    changing = {"down_blocks.1.resnets.0", "down_blocks.2.resnets.0"}
    changing |= {"up_blocks.2.resnets.0", "up_blocks.3.resnets.0"}
    assert len(names) == 16 + 22 - len(changing)
    assert not names & changing


def test_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="paper, all, none"):
        find_units(load_shape("pocket"), "most")


@given(seed=SEEDS, rows=st.integers(1, 3))
def test_split_gives_every_coordinate_to_one_layer(unet, seed, rows):
    space = find_units(unet, "all")
    code = torch.rand(rows, space.size, generator=torch.Generator().manual_seed(seed))
    u, v = space.split(code)
    assert u.keys() == {layer.name for layer in space.depth_layers}
    assert v.keys() == {layer.name for layer in space.width_layers}
    parts = [v[layer.name] for layer in space.width_layers]
    parts += [u[layer.name][:, None] for layer in space.depth_layers]
    assert torch.equal(torch.cat(parts, 1), code)
    one_u, one_v = space.split(code[0])
    assert all(value.ndim == 0 for value in one_u.values())
    assert all(value.ndim == 1 for value in one_v.values())


def test_split_refuses_a_code_of_another_unet(unet):
    space = find_units(unet)
    with pytest.raises(ValueError, match=str(space.size)):
        space.split(torch.zeros(2, space.size + 1))


# ---- Gumbel-sigmoid ----


def test_gumbel_noise_has_gumbels_distribution():
    draws = gumbel_noise((200_000,), generator=torch.Generator().manual_seed(0)).double()
    assert draws.isfinite().all()
    assert draws.mean().item() == pytest.approx(0.5772156649, abs=0.01)
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for x in (-1.0, 0.0, 1.0, 3.0):
        share = (draws <= x).double().mean().item()
        assert share == pytest.approx(math.exp(-math.exp(-x)), abs=0.005)


@pytest.mark.parametrize("temperature", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("logit", [-3.0, -1.0, 0.0, 0.5, 2.0])
def test_share_of_open_gates_is_the_closed_form(logit, temperature):
    draw = torch.Generator().manual_seed(1)
    gates = gumbel_sigmoid(torch.full((50_000,), logit), temperature, generator=draw)
    probability = 1 - math.exp(-math.exp(logit))  # P(Gumbel > -logit)
    share = (gates > 0.5).double().mean().item()
    deviation = math.sqrt(probability * (1 - probability) / 50_000)
    assert abs(share - probability) < 4 * deviation


def test_gumbel_sigmoid_follows_its_formula_and_its_generator():
    logits = torch.linspace(-4, 4, 9).requires_grad_()
    noise = gumbel_noise((9,), generator=torch.Generator().manual_seed(5))
    gates = gumbel_sigmoid(logits, 0.4, generator=torch.Generator().manual_seed(5))
    expected = 1 / (1 + torch.exp(-(logits + noise) / 0.4))
    assert torch.allclose(gates, expected, atol=1e-6)
    gates.sum().backward()
    slope = (expected * (1 - expected) / 0.4).detach()
    assert torch.allclose(logits.grad, slope, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (4, 1)])
def test_noise_that_is_given_is_the_noise_that_is_used(shape):
    """One row of it serves a whole batch."""
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 6, generator=draw, requires_grad=True)
    noise = torch.randn(shape, generator=draw)
    gates = gumbel_sigmoid(logits, 0.4, noise=noise)
    for i in range(4):
        for j in range(6):
            g = noise[i % shape[0], j % shape[1]].item()
            expected = 1 / (1 + math.exp(-(logits[i, j].item() + g) / 0.4))
            assert gates[i, j].item() == pytest.approx(expected, abs=1e-6)
    gates.sum().backward()
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gates_keep_type_and_shape_and_stay_in_the_unit_interval(dtype):
    logits = torch.tensor([[-1e4, -20.0, 0.0], [3.0, 20.0, 1e4]], dtype=dtype)
    gates = gumbel_sigmoid(logits)
    assert gates.dtype == dtype and gates.shape == logits.shape
    assert ((gates >= 0) & (gates <= 1)).all()
    assert gates[0, 0] == 0 and gates[1, 2] == 1


def test_temperature_must_be_positive():
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            gumbel_sigmoid(torch.zeros(3), temperature)


# ---- binary codes ----


@given(seed=SEEDS, threshold=st.floats(-4, 4))
def test_binarize_keeps_what_is_above_and_the_best_of_each_layer(unet, seed, threshold):
    space = find_units(unet)
    logits = torch.randn(2, space.size, generator=torch.Generator().manual_seed(seed))
    gates = binarize(logits, space, threshold=threshold)
    for row in range(2):
        for layer in space.layers:
            values, kept = logits[row, layer.span].tolist(), gates[row, layer.span].tolist()
            expected = [float(value > threshold) for value in values]
            if layer.kind != "depth" and not any(expected):
                expected[values.index(max(values))] = 1.0
            assert kept == expected
    assert torch.equal(binarize(logits, threshold=threshold), (logits > threshold).float())


def test_binarize_gives_no_gradient_and_is_repeatable(unet):
    space = find_units(unet)
    logits = torch.randn(space.size).requires_grad_()
    first, second = binarize(logits, space), binarize(logits, space)
    assert torch.equal(first, second) and not first.requires_grad

"""Gates on a running U-Net and experts cut out of it, on tiny U-Nets of four layouts."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import prune_unet
from common.errors import UserError
from common.files import save_tensors
from gates import ArchSpace, binarize, gumbel_sigmoid
from macs import measure_macs
from prune_unet import BlockRecorder, attach_gates, cut_expert, find_units, load_expert, save_expert

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("resnet", "attention", "feedforward", "depth")
SEEDS = st.integers(0, 2**31)
DEPTHS = st.sampled_from(("paper", "all", "none"))


def random_codes(space: ArchSpace, rows: int, open_share: float, kinds, seed: int) -> Tensor:
    """Binary codes (rows, D): units of `kinds` open with chance `open_share`, all others open."""
    draw = torch.Generator().manual_seed(seed)
    logits = open_share - torch.rand(rows, space.size, generator=draw)
    for layer in space.layers:
        if layer.kind not in kinds:
            logits[:, layer.span] = 1.0
    return binarize(logits, space)


@torch.no_grad()
def largest_difference(unet, space, codes, inputs) -> float:
    """Between the hard-gated U-Net on a mixed batch and each code's expert on its samples."""
    gates = attach_gates(unet, space)
    gates.set_gates(codes)
    gated = unet(**inputs).sample
    gates.detach()
    worst = 0.0
    for row, code in enumerate(codes):
        rows = slice(row, None, len(codes))  # its sample, and the same place in the batch's repeats
        own = {
            key: value[rows] if torch.is_tensor(value) else {k: v[rows] for k, v in value.items()}
            for key, value in inputs.items()
        }
        output = cut_expert(unet, code, space)(**own).sample
        worst = max(worst, (output - gated[rows]).abs().max().item())
    return worst


# ---- the expert is what was trained ----


@given(
    seed=SEEDS,
    depth=DEPTHS,
    open_share=st.floats(0, 1),
    kinds=st.sets(st.sampled_from(KINDS), min_size=1),
    rows=st.integers(1, 2),
    repeats=st.integers(1, 2),
)
@settings(max_examples=15)
def test_cut_equals_gated(unet, make_inputs, seed, depth, open_share, kinds, rows, repeats):
    space = find_units(unet, depth)
    codes = random_codes(space, rows, open_share, kinds, seed)
    inputs = make_inputs(unet, rows * repeats, seed)
    assert largest_difference(unet, space, codes, inputs) < 1e-5


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=str)
def test_cut_equals_gated_where_kinds_are_pruned_to_the_least(unet, make_inputs, kinds):
    space = find_units(unet, "all")
    codes = random_codes(space, 1, 0.0, kinds, 0)
    assert largest_difference(unet, space, codes, make_inputs(unet, 1)) < 1e-5


@pytest.fixture(scope="module")
def prices(unet):
    return {
        depth: measure_macs(unet, find_units(unet, depth), latent_size=8, text_tokens=5)
        for depth in ("paper", "all", "none")
    }


@given(seed=SEEDS, depth=DEPTHS, open_share=st.floats(0, 1))
@settings(max_examples=6)
def test_macs_of_a_code_are_those_counted_on_its_expert(
    unet, prices, make_inputs, seed, depth, open_share
):
    macs = prices[depth]
    code = random_codes(macs.space, 1, open_share, set(KINDS), seed)[0]
    expert = cut_expert(unet, code, macs.space)
    expert.set_attn_processor(AttnProcessor())  # plain matrix products, which the counter knows
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        expert(**make_inputs(unet, 1))
    assert macs(code).item() * 2 == counter.get_total_flops()


def test_cutting_leaves_the_dense_unet_alone(unet):
    space = find_units(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    expert = cut_expert(unet, random_codes(space, 1, 0.5, set(KINDS), 0)[0], space)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.fill_(7.0)
    after = unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in unet.parameters())
    assert sum(p.numel() for p in expert.parameters()) < sum(p.numel() for p in unet.parameters())


def test_an_expert_cut_with_gates_attached_has_none(unet, make_inputs):
    space = find_units(unet)
    code = random_codes(space, 1, 0.5, set(KINDS), 0)[0]
    gates = attach_gates(unet, space)
    gates.set_gates(torch.zeros(3, space.size))
    expert = cut_expert(unet, code, space)
    gates.detach()
    clean = cut_expert(unet, code, space)
    inputs = make_inputs(unet, 2)
    with torch.no_grad():
        assert torch.equal(expert(**inputs).sample, clean(**inputs).sample)


def test_codes_that_cannot_be_cut_are_refused(unet):
    space = find_units(unet)
    code = torch.ones(space.size)
    with pytest.raises(ValueError, match="binary"):
        cut_expert(unet, code * 0.5, space)
    with pytest.raises(ValueError, match="binary"):
        cut_expert(unet, code[1:], space)
    for layer in (space.width_layers[0], space.width_layers[-1]):
        empty = code.clone()
        empty[layer.span] = 0
        with pytest.raises(ValueError, match=layer.name):
            cut_expert(unet, empty, space)


# ---- gates ----


@torch.no_grad()
def test_the_dense_code_is_the_untouched_unet_bit_for_bit(unet, make_inputs):
    inputs = make_inputs(unet, 2)
    untouched = unet(**inputs).sample
    gates = attach_gates(unet, find_units(unet, "all"))
    assert torch.equal(unet(**inputs).sample, untouched)
    gates.set_gates(torch.ones(2, gates.space.size))
    assert torch.equal(unet(**inputs).sample, untouched)
    assert torch.equal(unet(**inputs, return_dict=False)[0], untouched)
    gates.detach()


@torch.no_grad()
def test_detach_leaves_no_trace(unet, make_inputs):
    def state():
        return [(name, sorted(vars(module))) for name, module in unet.named_modules()]

    def hooks():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return sum(len(getattr(module, kind)) for module in unet.modules() for kind in kinds)

    inputs, keys, before = make_inputs(unet, 2), list(unet.state_dict()), state()
    untouched = unet(**inputs).sample
    gates, recorder = attach_gates(unet), BlockRecorder(unet)
    gates.set_gates(torch.rand(2, gates.space.size))
    assert not torch.equal(unet(**inputs).sample, untouched)
    assert hooks() == len(gates.space.layers) + len(recorder.hooks) > 0
    gates.detach()
    recorder.detach()
    assert hooks() == 0
    assert list(unet.state_dict()) == keys
    assert state() == before
    assert torch.equal(unet(**inputs).sample, untouched)
    assert not gates.masks and not recorder.outputs


def gate_gradients(unet, inputs, space) -> Tensor:
    """|d denoising loss / d logit| of every unit, (D,), at soft gates about half open."""
    draw = torch.Generator().manual_seed(0)
    rows = len(inputs["sample"])
    logits = torch.randn(rows, space.size, generator=draw).requires_grad_()
    gates = attach_gates(unet, space)
    gates.set_gates(gumbel_sigmoid(logits, generator=draw))
    output = unet(**inputs).sample
    (output - torch.randn(output.shape, generator=draw)).square().mean().backward()
    gates.detach()
    assert logits.grad is not None
    return logits.grad.abs().mean(0)


def test_the_denoising_loss_reaches_every_unit(unet, make_inputs):
    space = find_units(unet, "all")
    gradients = gate_gradients(unet, make_inputs(unet, 4), space)
    assert (gradients > 0).all()
    size = {
        kind: torch.cat([gradients[layer.span] for layer in space.layers if layer.kind == kind])
        for kind in KINDS
    }
    # a mask before norm2 leaves ResBlocks a gradient a hundredth of the feed-forwards'
    assert size["resnet"].median() > size["feedforward"].median() / 5
    assert size["attention"].median() > size["feedforward"].median() / 5
    assert size["depth"].median() > size["feedforward"].median() / 5


def test_gates_of_a_wrong_shape_are_refused(unet, make_inputs):
    gates = attach_gates(unet)
    with pytest.raises(ValueError, match="gates must be"):
        gates.set_gates(torch.ones(gates.space.size))
    with pytest.raises(ValueError, match="gates must be"):
        gates.set_gates(torch.ones(2, gates.space.size + 1))
    gates.set_gates(torch.ones(2, gates.space.size))
    with pytest.raises(ValueError, match="3 samples"):
        unet(**make_inputs(unet, 3))
    gates.detach()


# ---- experts as files ----


@pytest.fixture
def saved(unet, tmp_path):
    space = find_units(unet)
    code = random_codes(space, 1, 0.5, set(KINDS), 1)[0]
    expert = cut_expert(unet, code, space)
    path = tmp_path / "expert.safetensors"
    save_expert(path, expert.state_dict(), unet.config, code, space, {"expert": 3})
    return path, expert, code


@torch.no_grad()
def test_an_expert_comes_back_from_its_file(saved, make_inputs):
    path, expert, code = saved
    loaded, meta = load_expert(path)
    assert meta["expert"] == 3 and meta["depth"] == "paper"
    assert torch.equal(torch.tensor(meta["code"]).float(), code)
    assert not loaded.training
    inputs = make_inputs(expert, 2)
    assert torch.equal(loaded(**inputs).sample, expert(**inputs).sample)


def test_files_that_are_no_experts_are_refused_by_name(saved, tmp_path):
    path, _, code = saved
    tensors, header = prune_unet.load_tensors(path)
    bad = tmp_path / "bad.safetensors"
    save_file(load_file(path), bad)  # the weights alone
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        load_expert(bad)
    for change in ({"code": (1 - code).int().tolist()}, {"depth": "all"}, {"code": "x"}):
        save_tensors(bad, tensors, {**header, **change})
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            load_expert(bad)
    tensors.pop(next(iter(tensors)))
    save_tensors(bad, tensors, header)
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        load_expert(bad)

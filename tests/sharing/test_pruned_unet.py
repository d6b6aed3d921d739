"""The U-Nets of a published folder, beside those that prune_unet.py makes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gates import binarize
from prune_unet import attach_gates, cut_expert, find_units
from sharing.pruned_unet import PrunedUNet2DConditionModel, RoutedUNet, cut, find_cuts
from sharing.publish import kept_units


def random_code(space, seed):
    draw = torch.Generator().manual_seed(seed)
    return binarize(torch.randn(space.size, generator=draw) + 0.3, space)


def pruned(unet, code, space):
    """The expert of a code, as a published folder holds it."""
    model = PrunedUNet2DConditionModel(**dict(unet.config), kept=kept_units(space, code)).eval()
    model.load_state_dict(cut_expert(unet, code, space).state_dict())
    return model.requires_grad_(False)


@settings(max_examples=4)
@given(seed=st.integers(0, 1000), depth=st.sampled_from(["paper", "all", "none"]))
def test_it_cuts_as_the_run_does(unet, make_inputs, seed, depth):
    """Every weight, and what is computed with them: by the gated U-Net too."""
    space = find_units(unet, depth)
    code, inputs = random_code(space, seed), make_inputs(unet, 2, seed)
    expert, own = cut_expert(unet, code, space), copy.deepcopy(unet)
    kept = kept_units(space, code)
    cut(own, kept, find_cuts(own, kept))
    states = own.state_dict(), expert.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    with torch.no_grad():
        assert torch.equal(own(**inputs).sample, expert(**inputs).sample)
        handle = attach_gates(unet, space)
        handle.set_gates(code[None])
        gated = unet(**inputs).sample
        handle.detach()
    assert torch.allclose(own(**inputs).sample, gated, atol=1e-5, rtol=1e-4)


def test_it_is_saved_and_loaded_as_any_model(unet, make_inputs, tmp_path):
    space = find_units(unet, "all")
    model, inputs = pruned(unet, random_code(space, 1), space), make_inputs(unet, 2)
    model.save_pretrained(tmp_path)
    again = PrunedUNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).sample, model(**inputs).sample)
    dense = sum(p.numel() for p in unet.parameters())
    assert sum(w.numel() for w in load_file(next(tmp_path.glob("*.safetensors"))).values()) < dense


@pytest.fixture
def mixture(smallest, tmp_path):
    """Three experts, none of them loaded, and the experts themselves."""
    space = find_units(smallest, "all")
    experts = [pruned(smallest, random_code(space, seed), space) for seed in range(3)]
    for i, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / str(i))
    RoutedUNet(3, **dict(smallest.config)).save_config(tmp_path)
    return RoutedUNet.from_pretrained(tmp_path), experts


def test_each_sample_goes_through_its_own_expert(mixture, make_inputs, smallest, tmp_path):
    """Of twice as many samples, as classifier-free guidance asks for; no other one is loaded."""
    own, experts = mixture
    own.rows, inputs = (rows := [2, 0, 2]), make_inputs(smallest, 6)
    with torch.no_grad():
        found = own(**inputs).sample
        for i in set(rows):
            alone = experts[i](**inputs).sample
            for k in (k for k in range(6) if rows[k % 3] == i):
                assert torch.allclose(found[k], alone[k], atol=1e-5)
    assert {*own.experts} == {"0", "2"}
    own.save_pretrained(tmp_path / "again")
    again = RoutedUNet.from_pretrained(tmp_path / "again")
    state = again.expert(1).state_dict()
    assert all(torch.equal(state[name], w) for name, w in experts[1].state_dict().items())


def test_an_expert_that_is_loaded_later_goes_where_the_others_are(mixture):
    own, _ = mixture
    own.expert(0)
    own.to(torch.bfloat16)
    own.to("meta")
    assert own.expert(2).dtype == own.dtype == torch.bfloat16
    assert own.expert(2).device == own.device == torch.device("meta")


def test_an_expert_that_does_not_exist_is_refused(mixture):
    with pytest.raises(ValueError, match="no expert 3; choose 0 to 2"):
        mixture[0].expert(3)


def test_a_batch_that_rows_do_not_fit_is_refused(mixture, make_inputs, smallest):
    mixture[0].rows = [0, 0]
    with pytest.raises(ValueError, match="3 samples"):
        mixture[0](**make_inputs(smallest, 3))

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


def test_each_sample_goes_through_its_own_expert(unet, make_inputs, tmp_path):
    """Of twice as many samples, as classifier-free guidance asks for, after saving and loading."""
    space = find_units(unet, "all")
    codes = [random_code(space, seed) for seed in range(3)]
    kept = [kept_units(space, code) for code in codes]
    experts = [pruned(unet, code, space) for code in codes]
    RoutedUNet(**dict(unet.config), kept=kept).save_pretrained(tmp_path)
    mixture = RoutedUNet.from_pretrained(tmp_path)
    for own, expert in zip(mixture.experts, experts, strict=True):
        own.load_state_dict(expert.state_dict())
    mixture.rows, inputs = (rows := [2, 0, 2]), make_inputs(unet, 6)
    with torch.no_grad():
        found = mixture(**inputs).sample
        for i in set(rows):
            alone = experts[i](**inputs).sample
            for k in (k for k in range(6) if rows[k % 3] == i):
                assert torch.allclose(found[k], alone[k], atol=1e-5)


def test_a_batch_that_rows_do_not_fit_is_refused(smallest, make_inputs):
    mixture = RoutedUNet(**dict(smallest.config), kept=[{}])
    mixture.rows = [0, 0]
    with pytest.raises(ValueError, match="3 samples"):
        mixture(**make_inputs(smallest, 3))

"""Distances to the teacher, against U-Nets that are cut out for each sample."""

import pytest
import torch

import evaluate
from common.randomness import step_generator
from evaluation import distances
from macs import meet_budget
from prune_unet import cut_expert
from teacher.model import add_noise


class Rows(list):
    """Rows of which any may be taken."""

    def take(self, rows: list[int]) -> list[int]:
        return rows


@torch.no_grad()
def test_distances_are_those_of_the_experts_that_are_cut_out(setup_of, smallest, monkeypatch):
    """Each sample through a U-Net cut for it; exchanged, and one code of the mean, likewise."""
    setup = setup_of(smallest)
    teacher, macs, space, N = setup.teacher, setup.macs, setup.space, 3
    logits = torch.randn(N, space.size, generator=torch.Generator().manual_seed(2))
    codes = meet_budget(logits, torch.ones(N), macs, 0.6)
    own = torch.tensor([k * k % N for k in range(len(setup.z))])  # unequal shares
    data = Rows(range(len(setup.z)))
    monkeypatch.setattr(distances, "encode_target", lambda *_: setup.encoded)
    found = evaluate.distances_of(teacher, data, codes, own.tolist(), macs)

    rows = torch.arange(len(own))
    noised = add_noise(teacher, *setup.encoded.batch(rows), step_generator(0, "distance", 0))
    shares = torch.bincount(own, minlength=N) / len(own)
    budget = (shares.double() @ macs(codes)).item() / macs.dense
    static = meet_budget(shares[None] @ codes, torch.ones(1), macs, budget)
    expected = {"distance": codes[own], "distance_exchanged": codes[(own + 1) % N]}
    expected["distance_static"] = static.expand(len(own), -1)
    assert set(found) == set(expected)
    for name, of_rows in expected.items():
        for row in rows.tolist():
            inputs = noised.part(rows[row : row + 1]).inputs()
            difference = cut_expert(smallest, of_rows[row], space)(**inputs).sample
            difference -= smallest(**inputs).sample
            mean = difference.square().mean().item()
            assert found[name][row].item() == pytest.approx(mean, rel=1e-3), (name, row)
    alone = evaluate.distances_of(teacher, data, torch.ones(1, space.size), [0] * len(own), macs)
    assert set(alone) == {"distance"} and alone["distance"].abs().max() < 1e-10

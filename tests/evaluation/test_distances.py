"""Distances to the teacher, against the gated U-Net one sample at a time."""

from types import SimpleNamespace

import pytest
import torch

import evaluate
from common.randomness import step_generator
from evaluation import distances
from macs import meet_budget
from prune_unet import attach_gates, cut_expert
from teacher.model import add_noise


class Rows(list):
    """Rows of which any may be taken."""

    def take(self, rows: list[int]) -> list[int]:
        return rows


@torch.no_grad()
def test_distances_are_those_of_the_gated_unet(setup_of, smallest, monkeypatch):
    """Each sample by its expert, by the next one, and by one code of the codes' mean."""
    setup = setup_of(smallest)
    teacher, macs, space, N = setup.teacher, setup.macs, setup.space, 3
    logits = torch.randn(N, space.size, generator=torch.Generator().manual_seed(2))
    codes = meet_budget(logits, torch.ones(N), macs, 0.6)
    own = torch.tensor([k * k % N for k in range(len(setup.z))])  # unequal shares
    data = Rows(range(len(setup.z)))
    monkeypatch.setattr(distances, "encode_target", lambda *_: setup.encoded)
    tuned = [False]
    experts = [cut_expert(smallest, code, space) for code in codes]
    pipeline = SimpleNamespace(
        teacher=teacher,
        space=space,
        codes=codes,
        ratios=[0.6] * N,
        unet=lambda i: experts[i],
        is_finetuned=lambda i: tuned[0],
        macs=lambda: macs,
    )
    found = evaluate.distances_of(pipeline, data, own.tolist())

    rows = torch.arange(len(own))
    noised = add_noise(teacher, *setup.encoded.batch(rows), step_generator(0, "distance", 0))
    shares = torch.bincount(own, minlength=N) / len(own)
    budget = (shares.double() @ macs(codes)).item() / macs.dense
    static = meet_budget(shares[None] @ codes, torch.ones(1), macs, budget)
    expected = {"distance": codes[own], "distance_exchanged": codes[(own + 1) % N]}
    expected["distance_static"] = static.expand(len(own), -1)
    assert set(found) == set(expected)
    gates = attach_gates(smallest, space)
    for name, of_rows in expected.items():
        for row in rows.tolist():
            inputs = noised.part(rows[row : row + 1]).inputs()
            gates.set_gates(of_rows[row : row + 1])
            difference = smallest(**inputs).sample
            gates.set_gates(None)
            difference -= smallest(**inputs).sample
            mean = difference.square().mean().item()
            assert found[name][row].item() == pytest.approx(mean, rel=1e-3), (name, row)
    gates.detach()
    tuned[0] = True  # one code of the mean is no control of experts that were tuned
    experts = [smallest] * N
    found = evaluate.distances_of(pipeline, data, own.tolist())
    assert set(found) == {"distance", "distance_exchanged"}
    assert max(values.abs().max() for values in found.values()) < 1e-10

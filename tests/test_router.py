"""The router: embeddings, balanced assignment while training, nearest code afterwards."""

import pytest
import torch
from torch.nn import functional as F

from router import PromptEncoder, PromptRouter

PROMPTS = ["a giraffe", "an elephant in the savanna", "a slice of pizza", "the japan flag"]


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder("minilm")


@pytest.fixture
def router():
    torch.manual_seed(0)
    router = PromptRouter(16, 40, 4)
    with torch.no_grad():
        router.codes += 0.3 * torch.randn(4, 40)
        router.mean_z.copy_(torch.randn(16))
    return router


def test_predictor_is_one_linear_layer_that_starts_open(router):
    z = F.normalize(torch.randn(5, 16), dim=-1)
    e = router(z)
    assert torch.allclose(e, z @ router.predictor.weight.T + router.predictor.bias, atol=1e-6)
    assert e.mean().item() == pytest.approx(2.0, abs=0.2)


def test_similarity_is_the_cosine_of_centred_vectors(router):
    e = torch.randn(6, 40)
    mean = router.predictor(router.mean_z).detach()
    for i in range(4):
        for j in range(6):
            code, embedding = (router.codes[i] - router.codes.mean(0)).detach(), e[j] - mean
            cosine = code @ embedding / (code.norm() * embedding.norm())
            assert router.similarity(e)[i, j].item() == pytest.approx(cosine.item(), abs=1e-5)
    router.center = False
    cosine = F.cosine_similarity(router.codes[2], e[3], dim=0)
    assert router.similarity(e)[2, 3].item() == pytest.approx(cosine.item(), abs=1e-5)


def test_transport_spreads_a_batch_that_nearest_would_not(router):
    e = router(router.mean_z + 0.3 * torch.randn(64, 16))
    e = e + router.codes[1] - router.codes.mean(0)  # everything is nearest to code 1
    assert (router.nearest(e) == 1).float().mean() > 0.9
    counts = torch.bincount(router.transport(e, eps=0.05, iterations=200), minlength=4)
    # 16 each, give or take the rounding to one expert a prompt
    assert counts.min() >= 6 and counts.max() <= 26


def test_assign_gives_each_sample_its_experts_code_with_gradient(router):
    e = torch.randn(8, 40)
    experts, a = router.assign(e)
    assert torch.equal(a, router.codes[experts])
    a.sum().backward()
    counts = torch.bincount(experts, minlength=4).float()
    assert torch.allclose(router.codes.grad, counts[:, None].expand(4, 40))


def test_test_time_routing_does_not_depend_on_the_batch(router):
    z = torch.randn(30, 16)
    together = router.route(z)
    assert torch.equal(together, torch.cat([router.route(row[None]) for row in z]))
    assert torch.equal(together.flip(0), router.route(z.flip(0)))
    best = torch.stack([router.similarity(router(row[None]))[:, 0].argmax() for row in z])
    assert torch.equal(together, best)


def test_routing_text_is_routing_its_embedding(router, encoder):
    router = PromptRouter(384, 40, 4)
    with torch.no_grad():
        router.codes += torch.randn(4, 40)
    assert torch.equal(router.route(PROMPTS, encoder), router.route(encoder(PROMPTS)))
    with pytest.raises(ValueError, match="encoder"):
        router.route(PROMPTS)


def test_started_codes_are_the_clusters_of_the_prompts():
    torch.manual_seed(1)
    router = PromptRouter(16, 40, 3)
    centres = torch.eye(16)[:3] * 10
    labels = torch.arange(3).repeat_interleave(20)
    z = centres[labels] + 0.1 * torch.randn(60, 16)
    router.mean_z.copy_(z.mean(0))
    router.start_codes(z, seed=0)
    routed = router.route(z)
    assert all(len(routed[labels == i].unique()) == 1 for i in range(3))
    assert len(routed.unique()) == 3


def test_settings_rebuild_the_router(router):
    again = PromptRouter(**router.settings())
    again.load_state_dict(router.state_dict())
    z = torch.randn(9, 16)
    assert torch.equal(again.route(z), router.route(z))

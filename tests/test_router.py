"""The router: embeddings, balanced assignment while training, nearest code afterwards."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from router import PromptEncoder, PromptRouter, content_map

PROMPTS = ["a giraffe", "an elephant in the savanna", "a slice of pizza", "the japan flag"]
N, D, DZ = 4, 40, 16
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder("minilm")


def random_router(seed: int = 0, **options) -> PromptRouter:
    """A router in training: its codes differ and have left its keys, its prompts lie anywhere."""
    torch.manual_seed(seed)
    router = PromptRouter(DZ, D, N, **options)
    with torch.no_grad():
        router.codes += 0.3 * torch.randn(N, D)
        router.keys.copy_(router.codes - router.predictor.bias + 0.1 * torch.randn(N, D))
        router.mean_z.copy_(torch.randn(DZ))
        router.content += 0.1 * torch.randn(DZ, DZ)
    return router


@pytest.fixture
def router():
    return random_router()


def keys_of(router: PromptRouter) -> Tensor:
    """What embeddings are compared with, (N, D), b included."""
    b = router.predictor.bias.detach()
    return router.keys + b if router.own_keys else router.codes.detach()


def cosines(router: PromptRouter, e: Tensor) -> np.ndarray:
    """Cosine of each key with each embedding, (N, B), written out; centred if the router is."""
    A, E = (x.detach().double().numpy() for x in (keys_of(router), e))
    if router.center:
        A, E = A - A.mean(0), E - router.predictor.bias.detach().double().numpy()
    table = np.zeros((len(A), len(E)))
    for i, a in enumerate(A):
        for j, vector in enumerate(E):
            table[i, j] = (a * vector).sum() / np.sqrt((a * a).sum() * (vector * vector).sum())
    return table


def plan(table: np.ndarray, eps: float, iterations: int) -> np.ndarray:
    """Sinkhorn-Knopp of a table of similarities, as Eq. 7 has it."""
    Q = np.exp(table / eps)
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdims=True) / len(Q)
        Q = Q / Q.sum(0, keepdims=True) / Q.shape[1]
    return Q


# ---- embeddings and codes ----


def test_predictor_is_one_linear_layer_of_centred_content_that_starts_open():
    router = random_router()
    z = F.normalize(torch.randn(5, DZ), dim=-1)
    weight, bias = router.predictor.weight, router.predictor.bias
    content = router.content
    expected = torch.stack([weight @ content @ (row - router.mean_z) + bias for row in z])
    assert torch.allclose(router(z), expected, atol=1e-6)
    assert router(router.mean_z[None]).mean().item() == pytest.approx(2.0)
    fresh = PromptRouter(DZ, D, N, open_logit=1.5)
    assert fresh.codes.eq(1.5).all() and fresh.predictor.bias.eq(1.5).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("own_keys", [True, False])
def test_a_start_and_a_shift_move_every_embedding_and_every_code(center, own_keys):
    router, z = random_router(center=center, own_keys=own_keys), torch.randn(5, DZ)
    e, codes = router(z), router.codes.clone()
    router.shift(0.7)
    assert torch.allclose(router(z), e + 0.7, atol=1e-6)
    assert torch.allclose(router.codes, codes + 0.7, atol=1e-6)
    assert np.allclose(router.similarity(router(z)), cosines(router, router(z)), atol=1e-5)
    logits, weight = torch.randn(D), torch.randn(D, DZ)
    router.start(logits, weight)
    assert torch.allclose(router(router.mean_z[None])[0], logits, atol=1e-6)
    assert torch.equal(router.codes, logits.expand(N, D))
    assert torch.equal(router.predictor.weight, weight)


@pytest.mark.parametrize("center", [True, False])
def test_where_b_goes_routing_stays(center):
    """Keys follow b: after a shift, prompts of a clustering are spread as they were before."""
    router = random_router(center=center)
    z = torch.randn(200, DZ, generator=torch.Generator().manual_seed(3))
    router.start_codes(z)
    before = router.route(z)
    router.shift(0.3)
    after = router.route(z)
    assert torch.bincount(before, minlength=N).min() > 10
    assert (before == after).float().mean() > (0.99 if center else 0.7)
    assert torch.bincount(after, minlength=N).min() > 5


# ---- content ----


def test_content_is_what_an_images_captions_have_in_common():
    """Subjects lie along the first axes, wordings along the others: those are removed."""
    draw = torch.Generator().manual_seed(0)
    subject, wording = torch.randn(200, 6, generator=draw), torch.randn(4, 6, generator=draw)
    z = torch.cat([subject.repeat_interleave(4, 0), 2 * wording.repeat(200, 1)], 1)  # (800, 12)
    C = content_map(z, torch.arange(200).repeat_interleave(4))
    centred = z - z.mean(0)
    mapped = centred @ C.T
    assert mapped[:, 6:].std() < 0.2 * centred[:, 6:].std()
    assert F.cosine_similarity(mapped[:, :6], centred[:, :6]).min() > 0.95
    assert mapped.norm(dim=1).mean().item() == pytest.approx(centred.norm(dim=1).mean().item())


def test_where_images_have_one_caption_all_of_it_is_content():
    z = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(content_map(z, torch.arange(30)), torch.eye(8), atol=1e-5)
    same = content_map(z[:1].repeat(4, 1), torch.tensor([0, 0, 1, 1]))  # nothing to tell apart
    assert torch.equal(same, torch.eye(8))
    numbered = content_map(z, 100 - 3 * torch.arange(30))
    assert torch.allclose(numbered, torch.eye(8), atol=1e-5)


# ---- similarities ----


@given(seed=SEEDS, center=st.booleans(), own_keys=st.booleans())
def test_test_time_routing_takes_the_key_of_the_highest_cosine(seed, center, own_keys):
    router = random_router(seed % 1000, center=center, own_keys=own_keys)
    z = torch.randn(30, DZ, generator=torch.Generator().manual_seed(seed))
    expected = torch.from_numpy(cosines(router, router(z)).argmax(0))
    assert torch.equal(router.route(z), expected)
    assert len(expected.unique()) > 1


# ---- transport ----


def test_transport_spreads_a_batch_that_nearest_would_not(router):
    e = router(router.mean_z + 0.3 * torch.randn(64, DZ))
    e = e + router.keys[1] - router.keys.mean(0)  # everything is nearest to code 1
    assert (router.nearest(e) == 1).float().mean() > 0.9
    experts = router.transport_assignment(e, eps=0.05, iterations=200)
    counts = torch.bincount(experts, minlength=N)
    # 16 each, give or take the rounding to one expert a prompt
    assert counts.min() >= 6 and counts.max() <= 26


@given(seed=SEEDS, iterations=st.integers(1, 5))
def test_assignment_is_the_plan_of_the_batch(seed, iterations):
    router, draw = random_router(), torch.Generator().manual_seed(seed)
    e = torch.randn(9, D, generator=draw) + 1
    Q = plan(cosines(router, e), 0.1, iterations)  # (N, 9)
    assert router.assign(e, eps=0.1, iterations=iterations).tolist() == Q.argmax(0).tolist()


def test_without_transport_prompts_take_their_nearest_code(router):
    e = router(torch.randn(7, DZ))
    assert torch.equal(router.assign(e, transport=False), router.nearest(e))
    crowded = e[:1].repeat(7, 1)  # seven times the same prompt
    assert router.assign(crowded, transport=False).unique().numel() == 1
    assert router.assign(crowded + 1e-3 * torch.randn(7, D)).unique().numel() > 1


# ---- from prompts to files ----


def test_routing_text_is_routing_its_embedding(encoder):
    router = PromptRouter(384, D, N)
    router.keys.copy_(torch.randn(N, D))
    assert torch.equal(router.route(PROMPTS, encoder), router.route(encoder(PROMPTS)))
    with pytest.raises(ValueError, match="encoder"):
        router.route(PROMPTS)


@pytest.mark.parametrize("options", [{}, {"center": False}], ids=str)
def test_started_codes_are_the_clusters_of_the_prompts(options):
    torch.manual_seed(1)
    router = PromptRouter(DZ, D, 3, **options)
    centres = torch.eye(DZ)[:3] * 10
    labels = torch.arange(3).repeat_interleave(20)
    z = centres[labels] + 0.1 * torch.randn(60, DZ)
    router.mean_z.copy_(z.mean(0))
    router.start_codes(z, seed=0)
    routed = router.route(z)
    assert all(len(routed[labels == i].unique()) == 1 for i in range(3))
    assert len(routed.unique()) == 3
    means = torch.stack([router(z[routed == i]).mean(0) for i in range(3)])
    assert torch.allclose(router.codes, means, atol=1e-5)
    assert torch.allclose(keys_of(router), means, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"center": False}, {"own_keys": False}], ids=str)
def test_settings_rebuild_the_router(options):
    router = random_router(**options)
    again = PromptRouter(**router.settings())
    again.load_state_dict(router.state_dict())
    z = torch.randn(9, DZ)
    assert torch.equal(again.route(z), router.route(z))
    assert torch.equal(again.codes, router.codes)

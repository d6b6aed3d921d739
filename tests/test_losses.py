"""Every loss against a plain loop written from the paper's equation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import losses

SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- images ----


@given(seed=SEEDS, B=st.integers(1, 4))
def test_squared_distances_are_means_over_each_sample(seed, B):
    x, y = random(B, 2, 3, 3, seed=seed), random(B, 2, 3, 3, seed=seed + 1)
    expected = []
    for b in range(B):
        pairs = zip(x[b].flatten().tolist(), y[b].flatten().tolist(), strict=True)
        expected.append(sum((p - q) ** 2 for p, q in pairs) / 18)
    for loss in (losses.denoising_loss, losses.output_distillation_loss):
        assert torch.allclose(loss(x, y), torch.tensor(expected), rtol=1e-5)


def plain_blocks(student: list[Tensor], teacher: list[Tensor], normalise: bool) -> list[float]:
    """Eq. 28 of each sample over plain numbers: squared norms, relative to the teacher's or not."""
    found = []
    for b in range(len(student[0])):
        terms = []
        for s, t in zip(student, teacher, strict=True):
            ours, theirs = s[b].flatten().tolist(), t[b].flatten().tolist()
            error = sum((q - p) ** 2 for p, q in zip(ours, theirs, strict=True))
            terms.append(error / (sum(q**2 for q in theirs) if normalise else len(theirs)))
        found.append(sum(terms) / (len(terms) if normalise else 1))
    return found


@given(seed=SEEDS, B=st.integers(1, 3), normalise=st.booleans())
def test_block_distillation_equals_the_loop(seed, B, normalise):
    shapes = [(B, 4, 3, 3), (B, 2, 5, 5), (B, 7, 1, 1)]
    student = [random(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    teacher = [10**i * random(*shape, seed=seed + 9 + i) for i, shape in enumerate(shapes)]
    loss = losses.block_distillation_loss(student, teacher, normalise)
    expected = torch.tensor(plain_blocks(student, teacher, normalise))
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_a_teachers_block_of_zeros_gives_a_finite_loss():
    blocks = [random(2, 3).requires_grad_()], [torch.zeros(2, 3)]
    loss = losses.block_distillation_loss(*blocks).sum()
    loss.backward()
    assert loss.isfinite() and blocks[0][0].grad.isfinite().all()


@pytest.mark.parametrize(("normalise", "weight"), [(True, 0.2), (False, 1.0), (True, 0.0)])
def test_distillation_adds_the_blocks_to_the_output_and_spares_the_teacher(normalise, weight):
    shapes = [(2, 4, 8, 8), (2, 8, 4, 4), (2, 4, 8, 8)]
    student = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    teacher = [random(*shape, seed=9 + i).requires_grad_() for i, shape in enumerate(shapes)]
    out, target = random(2, 3, 8, 8).requires_grad_(), random(2, 3, 8, 8, seed=1).requires_grad_()
    loss = losses.distillation_loss(out, target, student, teacher, normalise, weight)
    expected = weight * torch.tensor(plain_blocks(student, teacher, normalise))
    for b in range(2):
        expected[b] += ((out[b] - target[b]) ** 2).sum().item() / out[b].numel()
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.sum().backward()
    assert all((s.grad is not None and s.grad.abs().sum() > 0) == (weight > 0) for s in student)
    assert out.grad.abs().sum() > 0
    assert all(t.grad is None for t in [target, *teacher])


def test_block_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 student blocks but 1 teacher"):
        losses.block_distillation_loss([torch.zeros(1, 2)] * 2, [torch.zeros(1, 2)])


def test_losses_of_half_precision_outputs_are_computed_in_single():
    x, y = 300 * random(2, 3).half(), torch.zeros(2, 3).half()  # squares overflow half precision
    assert losses.denoising_loss(x, y).dtype == torch.float32
    assert losses.denoising_loss(x, y).isfinite().all()


# ---- contrastive: Eqs. 13-14 ----


def plain_contrastive(z: Tensor, e: Tensor, tau: float) -> float:
    """Eq. 13 with a minus sign, Eq. 14, as double loops over plain numbers."""
    B = len(z)

    def sim(m: list[float], n: list[float]) -> float:
        dot = sum(p * q for p, q in zip(m, n, strict=True))
        return dot / (math.sqrt(sum(p * p for p in m)) * math.sqrt(sum(q * q for q in n)))

    def softmax(vectors: Tensor) -> list[list[float]]:
        rows = vectors.double().tolist()
        raised = [[math.exp(sim(rows[i], rows[k]) / tau) for k in range(B)] for i in range(B)]
        return [[raised[i][j] / sum(raised[i]) for j in range(B)] for i in range(B)]

    r, s = softmax(z), softmax(e)
    total = 0.0
    for i in range(B):
        for j in range(B):
            total += r[i][j] * math.log(s[i][j]) + (1 - r[i][j]) * math.log(1 - s[i][j])
    return -total / B**2


@given(seed=SEEDS, B=st.integers(2, 6), tau=st.floats(0.3, 2), center=st.booleans())
def test_contrastive_loss_equals_the_double_loop(seed, B, tau, center):
    z, e = random(B, 7, seed=seed), random(B, 11, seed=seed + 1).sigmoid()
    ours = losses.contrastive_loss(z, e, tau, center).item()
    if center:
        e = e - torch.stack([e[:, unit].sum() / B for unit in range(11)])
    assert ours == pytest.approx(plain_contrastive(z, e, tau), rel=1e-4)


def test_contrastive_loss_is_least_where_the_similarities_agree():
    z = random(6, 8)
    z = z - z.mean(0)
    agreeing = losses.contrastive_loss(z, 3 * z + 5, 0.3)  # neither length nor a common part
    for seed in range(5):
        assert losses.contrastive_loss(z, random(6, 8, seed=seed + 1), 0.3) > agreeing
    assert losses.contrastive_loss(z, 3 * z + 5, 0.3, center=False) > agreeing + 0.01


def test_minimising_it_brings_similar_prompts_architectures_together():
    z = F.normalize(torch.tensor([[1.0, 0.05], [1.0, -0.05], [-0.05, 1.0], [0.05, 1.0]]), dim=1)
    logits = random(4, 6).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        losses.contrastive_loss(z, logits.sigmoid(), 0.3).backward()
        optimizer.step()
    unit = F.normalize(logits.sigmoid(), dim=1)
    sim = unit @ unit.T
    assert min(sim[0, 1], sim[2, 3]) > sim[0:2, 2:4].max() + 0.1


def test_contrastive_loss_stays_finite_where_the_softmax_saturates():
    z, e = torch.eye(4), torch.eye(4).mul(50).requires_grad_()  # each like itself only
    loss = losses.contrastive_loss(z, e, 1e-3)
    loss.backward()
    assert loss.isfinite() and e.grad.isfinite().all()
    one = losses.contrastive_loss(random(1, 4), random(1, 4))  # a batch of one
    assert one.isfinite()


# ---- resources: Eqs. 26, 31 ----


@given(x=st.floats(1e6, 1e13), y=st.floats(1e6, 1e13))
def test_resource_loss_is_the_log_of_the_ratio_that_exceeds_one(x, y):
    loss = losses.resource_loss(torch.tensor(x, dtype=torch.float64), y).item()
    assert loss == pytest.approx(math.log(max(x, y) / min(x, y)), abs=1e-9)


def test_resource_loss_is_symmetric_and_pulls_towards_the_target():
    for ratio, sign in ((1.25, 1), (0.8, -1)):
        macs = torch.tensor(ratio * 1e12, dtype=torch.float64, requires_grad=True)
        loss = losses.resource_loss(macs, 1e12)
        loss.backward()
        assert loss.item() == pytest.approx(math.log(1.25))
        assert macs.grad.sign().item() == sign  # descent lowers what is above, raises what is below
    assert losses.resource_loss(torch.tensor(3e11), 3e11).item() == 0


@given(seed=SEEDS)
def test_the_budgets_multiplier_takes_out_of_the_gradient_what_changes_the_cost(seed):
    """With two parameters, of which one is shared by all samples."""
    parameters = [random(8, seed=seed + k).double().requires_grad_() for k in range(3)]
    a = torch.sigmoid(torch.stack([parameters[0] + p for p in parameters[1:]]))
    wanted, price = random(2, 8, seed=seed + 3), random(8, seed=seed + 4).abs().double() + 0.1
    image, log_T = (a - wanted).square().sum(), ((a @ price) ** 2).mean().log()
    g, h = (torch.autograd.grad(f, parameters, retain_graph=True) for f in (image, log_T))
    multiplier = losses.budget_multiplier(g, h)
    assert multiplier.item() >= 0 and multiplier.ndim == 0
    g, h = torch.cat(g), torch.cat(h)
    if g @ h >= 0:  # the image losses make it cheaper as they are
        assert multiplier.item() == 0
        return
    total = g + multiplier * h
    assert abs(total @ h) < 1e-9 * g.norm() * h.norm()
    assert total.norm() <= g.norm()  # the least-squares multiplier: the shortest rest
    at_once = torch.autograd.grad(image + multiplier * log_T, parameters)
    assert torch.allclose(torch.cat(at_once), total)


def test_the_budgets_multiplier_is_finite_where_no_gate_moves():
    assert losses.budget_multiplier([torch.ones(4)], [torch.zeros(4)]).item() == 0


# ---- the objectives: Eqs. 15, 30 ----


def plain_eq_15(image, resource, contrastive, assignment, N) -> float:
    total = 0.0
    for i in range(N):
        own = [x for x, expert in zip(image, assignment, strict=True) if expert == i]
        total += sum(own) / len(own) if own else 0.0
    return total / N + 2.0 * resource + 100.0 * contrastive


@given(seed=SEEDS, N=st.integers(1, 4), data=st.data())
def test_pruning_loss_equals_the_loop(seed, N, data):
    assignment = data.draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=9))
    B = len(assignment)
    denoising, distillation = random(B, seed=seed).abs(), random(B, seed=seed + 1).abs()
    resource, contrastive = torch.tensor(0.3).double(), torch.tensor(0.02)
    loss = losses.pruning_loss(
        denoising=denoising,
        distillation=distillation,
        resource=resource,
        contrastive=contrastive,
        experts=torch.tensor(assignment),
        num_experts=N,
    )
    image = (denoising + 0.2 * distillation).tolist()
    expected = plain_eq_15(image, 0.3, 0.02, assignment, N)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_weight_of_a_sample_is_one_over_experts_times_their_samples():
    weights = losses.sample_weights(torch.tensor([0, 0, 0, 2, 2]), 3, 5)
    assert torch.allclose(weights, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6]))
    assert losses.sample_weights(None, 3, 5).tolist() == pytest.approx([0.2] * 5)


def test_finetuning_loss_has_the_papers_weights():
    denoising, distillation = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.7])
    loss = losses.finetuning_loss(denoising, distillation)
    assert loss.item() == pytest.approx(1e-4 * 2.0 + 0.6)
    assert losses.finetuning_loss(denoising, distillation, 1.0, 0.0).item() == pytest.approx(2.0)

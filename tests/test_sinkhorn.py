"""Transport against a plain-domain loop, POT, and the properties that the paper states."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sinkhorn import sinkhorn

SIZES = {"N": st.integers(1, 9), "B": st.integers(1, 40), "seed": st.integers(0, 2**31)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def similarities(N: int, B: int, seed: int) -> Tensor:
    return 2 * torch.rand(N, B, generator=torch.Generator().manual_seed(seed)).double() - 1


def plain_loop(scores: Tensor, eps: float, iterations: int) -> np.ndarray:
    """Sinkhorn-Knopp as Cuturi wrote it: scale the rows of a positive matrix, then its columns."""
    K = np.exp(scores.double().numpy() / eps)
    N, B = K.shape
    m, n = np.ones(N), np.ones(B)
    for _ in range(iterations):
        m = (1 / N) / (K @ n)
        n = (1 / B) / (K.T @ m)
    return m[:, None] * K * n[None, :]


def row_error(Q: Tensor) -> float:
    """The largest relative distance of a row's sum from 1/N, which Eq. 6 asks for."""
    return (Q.sum(1) * len(Q) - 1).abs().max().item()


@given(**SIZES, eps=st.floats(0.03, 2), iterations=st.integers(1, 12))
def test_equals_the_plain_loop(N, B, seed, eps, iterations):
    scores = similarities(N, B, seed)
    expected = plain_loop(scores, eps, iterations)
    assert np.allclose(sinkhorn(scores, eps, iterations), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_converges_to_pot(eps):
    scores = similarities(6, 50, 0)
    rows, columns = np.full(6, 1 / 6), np.full(50, 1 / 50)
    expected = ot.sinkhorn(rows, columns, -scores.numpy(), eps, numItermax=5000, stopThr=1e-14)
    assert np.allclose(sinkhorn(scores, eps, 5000), expected, atol=1e-9)


def test_maximises_the_objective_of_eq_5():
    """No feasible step from Q* improves Tr(Q^T S) + eps H(Q)."""
    scores, eps = similarities(4, 12, 0), 0.1

    def objective(Q: Tensor) -> float:
        return float((Q * scores).sum() - eps * (Q * Q.clamp(min=1e-300).log()).sum())

    best = sinkhorn(scores, eps, 5000)
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = torch.randn(4, 12, generator=draw).double()
        step = step - step.mean(0) - step.mean(1, keepdim=True) + step.mean()  # marginals stay
        nearby = best + 0.3 * step * (best / step.abs()).min()
        assert objective(nearby) < objective(best)


@given(**SIZES, iterations=st.integers(1, 5))
def test_columns_are_exact_and_rows_converge(N, B, seed, iterations):
    scores = similarities(N, B, seed)
    few, many = sinkhorn(scores, 0.1, iterations), sinkhorn(scores, 0.1, 3000)
    for Q in (few, many):
        assert (Q >= 0).all()
        assert torch.allclose(Q.sum(0), torch.full((B,), 1 / B).double(), rtol=1e-12)
    assert torch.allclose(many.sum(1), torch.full((N,), 1 / N).double(), rtol=1e-6)
    assert row_error(many) <= row_error(few) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_extreme_scores_stay_finite_and_equipartition_their_columns(dtype, eps, size):
    scores = (size * similarities(8, 64, 3)).to(dtype)
    Q = sinkhorn(scores, eps, 3)
    assert Q.dtype == dtype and Q.shape == scores.shape
    assert Q.isfinite().all() and (Q >= 0).all()
    rounding = 4 * torch.finfo(dtype).eps
    assert torch.allclose(Q.double().sum(0), torch.full((64,), 1 / 64).double(), rtol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_loses_little_where_training_is(dtype):
    """At similarities in [-1, 1] and the paper's eps, a plan in any type is near the exact one."""
    scores = similarities(16, 1024, 3).to(dtype)
    exact = sinkhorn(scores.double(), 0.05, 3)
    error = (sinkhorn(scores, 0.05, 3).double() - exact).abs().max() * 1024  # of B Q*, in [0, 1]
    assert error < 4 * max(torch.finfo(dtype).eps, 1e-6)


@given(**SIZES)
def test_permuting_experts_and_prompts_permutes_the_plan(N, B, seed):
    scores = similarities(N, B, seed)
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(N, generator=draw), torch.randperm(B, generator=draw)
    permuted = sinkhorn(scores[rows][:, columns])
    assert torch.allclose(permuted, sinkhorn(scores)[rows][:, columns], atol=1e-12)


def test_a_shift_of_a_row_or_column_changes_nothing_in_the_limit():
    scores = similarities(5, 20, 0)
    shifted = scores + torch.randn(5, 1).double() + torch.randn(1, 20).double()
    assert torch.allclose(sinkhorn(shifted, 0.1, 3000), sinkhorn(scores, 0.1, 3000), atol=1e-9)


def test_small_eps_gives_one_hot_columns_and_equal_shares():
    scores = similarities(4, 40, 0)
    hard = sinkhorn(scores, 1e-3, 2000) * 40
    assert (hard.max(0).values > 0.9).float().mean() > 0.9
    assert torch.bincount(hard.argmax(0), minlength=4).tolist() == [10] * 4


def test_gives_no_gradient():
    assert not sinkhorn(similarities(3, 5, 0).requires_grad_()).requires_grad


def test_wrong_arguments_are_refused():
    for scores in (torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match="matrix"):
            sinkhorn(scores)
    for eps, iterations in ((0.0, 3), (-1.0, 3), (math.nan, 3), (0.05, 0)):
        with pytest.raises(ValueError, match="eps"):
            sinkhorn(torch.zeros(2, 3), eps, iterations)

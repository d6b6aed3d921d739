"""What an oracle would give to each prompt, and the tables of it."""

import pytest
import torch

from docs.needs import bare_names, interval_means, measure, needs, table
from targets.emoji import split_drawings


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_an_oracle_spends_the_budget_where_importance_is_higher(problem_of, smallest, budget):
    macs = problem_of(smallest).macs
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(200, macs.space.size, generator=generator) + 0.1  # (n, D)
    found = needs(importance, macs, budget)
    assert found.mean().item() == pytest.approx(budget, abs=0.01)
    # brute force: of all thresholds the one whose mean is nearest to the budget
    thresholds = importance.flatten().sort().values[::50]
    means = torch.stack([macs((importance > t).float()).mean() / macs.dense for t in thresholds])
    best = thresholds[(means - budget).abs().argmin()]
    expected = macs((importance > best).float()) / macs.dense
    assert (found - expected).abs().mean() < 0.005
    importance[0] = 1.2 * importance[1]  # the same units, all of them more important
    found = needs(importance, macs, budget)
    assert found[0] > found[1]


def test_needs_and_losses_are_relative_to_their_interval(problem_of, smallest):
    rows, need, loss = measure(problem_of(smallest, batch_size=12), 20)
    assert len(rows) == len(need) == len(loss) == 240
    assert need.mean().item() == pytest.approx(0.7, abs=0.02)
    assert loss.mean().item() == pytest.approx(1)
    values, interval = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 4])
    assert interval_means(values, interval).tolist() == [2, 2, 5]


def test_a_table_has_the_means_of_each_key():
    spent, need, loss = torch.tensor([[0.5, 0.7, 0.3], [1.0, 2.0, 4.0], [0.0, 1.0, 2.0]])
    lines = table("group", ["a", "a", "b"], spent, need, loss).splitlines()
    assert [[word.strip() for word in line.strip("|").split("|")] for line in lines[2:]] == [
        ["b", "1", "0.300", "4.000", "2.000"],
        ["a", "2", "0.600", "1.500", "0.500"],
    ]


def test_bare_names_are_counted_beside_chance():
    drawings = split_drawings("validation")[:4]
    asked: list[list[str]] = []

    def route(prompts: list[str]) -> list[int]:
        asked.append(prompts)
        return [[0, 1, 2, 2], [0, 0, 1, 2], [1, 1, 0, 0]][len(asked) - 1]

    text = bare_names(route, drawings)
    assert all(flat == f"{bare}, flat emoji" for bare, flat in zip(*asked[:2], strict=True))
    # forms {0, 1}, {0, 1}, {1, 0}, {2, 0}: names 0, 1 and 3 are right; shares 1/4, 1/4, 1/2
    assert text.startswith("75.0% of 4 ") and "(by chance 56.2%)" in text
    assert text.endswith("is 2.83.")

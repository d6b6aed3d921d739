"""What a finished run says about its prompts and its experts: Sec. 4.2, App. E.4.

| figure or table of the paper | name here |
|---|---|
| Tables 2, 4: frequent words per expert | `words_table`, `frequent_words` |
| Fig. 8: losses | `read_log` |
| Fig. 10: prompts per expert | `shares`, `perplexity` |
| - : MACs ratio by group of prompts | `group_costs` |
"""

from __future__ import annotations

import csv
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError


def shorten(text: str, most: int) -> str:
    """`text` on one line, without what cannot be printed, of at most `most` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


@cache
def word_pattern() -> re.Pattern[str]:
    """Three letters or more of any script, each with its marks, such as accents and vowel signs."""
    marks = [chr(c) for c in range(sys.maxunicode) if unicodedata.category(chr(c))[0] == "M"]
    return re.compile(rf"(?:[^\W\d_][{''.join(marks)}]*){{3,}}")


def frequent_words(captions: Sequence[str], everything: Sequence[str], count: int = 6) -> list[str]:
    """The most frequent of the words that are over twice as common here as in the data set.

    Equally frequent words are in alphabetical order.

    Args:
        captions: of the expert; they are among `everything`.
        everything: the data set's captions.
        count: the largest number of words to return.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    def word_shares(lines: Sequence[str]) -> dict[str, float]:
        plain = (unicodedata.normalize("NFC", line).lower() for line in lines)
        words = Counter(word for line in plain for word in set(word_pattern().findall(line)))
        ranked = sorted(words.items(), key=lambda item: (-item[1], item[0]))
        return {word: n / len(lines) for word, n in ranked}

    overall = word_shares(everything)
    return [
        word
        for word, n in word_shares(captions).items()
        if n > 2 * overall[word] and word not in ENGLISH_STOP_WORDS
    ][:count]


@dataclass(frozen=True)
class Routed:
    """The prompts of one split, each with its group ("" for none) and its expert at test time."""

    captions: Sequence[str]
    groups: Sequence[str]
    experts: Sequence[int]


def expert_order(ratios: Sequence[float]) -> list[int]:
    """Numbers of the experts from the fewest MACs to the most."""
    return sorted(range(len(ratios)), key=lambda i: (ratios[i], i))


def shares(experts: Sequence[int], num_experts: int) -> np.ndarray:
    """Share of the prompts that each expert gets, (N,); zeros where there are no prompts."""
    counts = np.bincount(np.asarray(experts, int), minlength=num_experts)
    return counts / max(1, len(experts))


def perplexity(share: np.ndarray) -> float:
    """Assignment perplexity: the exponential of the entropy of the shares (N,).

    It is N for an even assignment, and 1 where one expert gets all prompts.
    """
    used = share[share > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def words_table(train: Routed, validation: Routed, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """Tables 2 and 4 as rows: what each expert costs, how many prompts it gets, and which.

    Args:
        ratios: MACs ratio of each expert, (N,).
    """
    splits = {"training": train, "validation": validation}
    parts = {name: shares(routed.experts, len(ratios)) for name, routed in splits.items()}
    rows = []
    for i in expert_order(ratios):
        captions = [c for c, e in zip(train.captions, train.experts, strict=True) if e == i]
        words = [shorten(word, 30) for word in frequent_words(captions, train.captions)]
        examples = [captions[len(captions) * k // 4] for k in (1, 3)] if captions else []
        rows.append(
            {
                "expert": i,
                "MACs ratio": f"{ratios[i]:.3f}",
                **{f"of {split}": f"{share[i]:.1%}" for split, share in parts.items()},
                "frequent words": ", ".join(words),
                "two of its prompts": " / ".join(shorten(c, 60) for c in dict.fromkeys(examples)),
            }
        )
    return rows


class GroupCost(NamedTuple):
    """How many MACs the prompts of a group get."""

    group: str
    prompts: int
    mean: float  # MACs ratio
    error: float  # standard error of the mean; nan for a single prompt


def group_costs(routed: Routed, ratios: Sequence[float]) -> list[GroupCost]:
    """The groups from the most MACs to the fewest: which prompts the router treats as hard."""
    costs = np.asarray(ratios)[np.asarray(routed.experts, int)]  # (rows,)
    groups = np.asarray(routed.groups, object)
    rows = []
    for group in sorted(set(routed.groups)):
        own = costs[groups == group]
        error = own.std(ddof=1) / math.sqrt(len(own)) if len(own) > 1 else math.nan
        rows.append(GroupCost(group, len(own), float(own.mean()), float(error)))
    return sorted(rows, key=lambda row: -row.mean)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """A metrics.csv as column -> values, (steps,). Raises `UserError` where it holds none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    except (OSError, IndexError, TypeError, ValueError):
        raise UserError(
            f"{path} is missing, empty or damaged: name the folder of a finished run"
        ) from None

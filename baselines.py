"""What APTP is compared with: Sec. 4.1 and 4.3. A method scores units for all prompts alike.

| method | which units are closed first | looks at |
|---|---|---|
| `norm` | units with the smallest weights, L1 (Li et al., 2017) | weights |
| `sp` | units with the least Taylor importance, Diff-Pruning (Fang et al., 2023) | loss |
| `routed-sp` | the same, for each of N clusters of prompts: our control, not the paper's | loss |
| `obs` | units whose work others can do, `importance.surgeon_scores`: ours | loss, features |
| `routed-obs` | the same, for each of the N clusters: ours | loss, features |
| `routed-uni` | `uni-arch`'s one code N times, for each cluster to fine-tune: our control | loss |
| `bksdm` | whole blocks in a fixed order, BK-SDM (Kim et al., 2023) | weights |
| `random` | units chosen at random | seed |
| `uni-arch` | units with the lowest logits of one code, trained as APTP's, no router | loss |
| `dense` | none: the unpruned model, whatever the budget | - |

`run.write_results` closes the lowest scores by one threshold, as it closes APTP's logits, so every
method meets the budget in the same way, in MACs or in measured time. One threshold needs scores
that can be compared between layers.
How that is done, and what else differs from the papers: docs/departures.md#baselines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from common.randomness import step_generator
from gates import ArchSpace, Layer, inside
from importance import surgeon_scores, taylor_importance
from macs import ROUNDING, CostModel
from prune_unet import gated_module
from router import PromptRouter
from run import Setup
from train import CHECKPOINT, optimise

DEPTHS = {"bksdm": "all"}  # the space's depth where a method asks for one
BUDGETS = {"dense": 1.0}  # the budget where a method asks for one
ROUTED = ("routed-sp", "routed-obs", "routed-uni")  # with an expert for each cluster of prompts
ROUTED_BATCHES = 128  # batches for `routed-sp`: with eight clusters, 16 for each


def dense(setup: Setup, router: PromptRouter) -> Tensor:
    """The unpruned model: its budget closes none, (1, D)."""
    return torch.ones(1, setup.space.size)


def random(setup: Setup, router: PromptRouter) -> Tensor:
    """Scores at random, (1, D)."""
    generator = step_generator(setup.cfg.seed, "random code")
    return torch.rand(1, setup.space.size, generator=generator)


# ---- norm ----


def norm(setup: Setup, router: PromptRouter) -> Tensor:
    """Units of small weights score low, (1, D). Li et al., 2017."""
    return relative_norms(setup.teacher.unet, setup.space)[None]


@torch.no_grad()
def relative_norms(unet: UNet2DConditionModel, space: ArchSpace) -> Tensor:
    """L1 norms of units, divided by their layer's mean, and of layers, by their kind's, (D,)."""
    scores = torch.zeros(space.size)  # (D,)
    for layer in space.width_layers:
        norms = unit_norms(unet, layer)  # (units,)
        scores[layer.span] = (norms / norms.mean()).cpu()
    kinds: dict[type, list[int]] = {}
    for layer in space.depth_layers:
        module = unet.get_submodule(layer.name)
        weights = torch.cat([weight.flatten() for weight in module.parameters()])
        scores[layer.start] = weights.abs().mean().cpu()
        kinds.setdefault(type(module), []).append(layer.start)
    for units in kinds.values():
        scores[units] /= scores[units].mean()
    return scores


def unit_norms(unet: UNet2DConditionModel, layer: Layer) -> Tensor:
    """L1 norm of all weights and biases that are cut out with each unit of a width layer, (units,).

    The columns by which the unit is read and the rows that write it; where a projection writes two
    parts (a gated activation, scale and shift), the unit's rows in both.
    """
    owner, (reads, width) = unet.get_submodule(layer.name), gated_module(unet, layer)
    writers = {
        "resnet": ("conv1", "time_emb_proj", "norm2"),
        "attention": ("to_q", "to_k", "to_v"),
        "feedforward": ("net.0.proj",),
    }[layer.kind]
    columns = reads.get_parameter("weight").transpose(0, 1).reshape(layer.units, -1)
    total = columns.abs().sum(1)  # (units,)
    for name in writers:
        if getattr(owner, name.partition(".")[0]) is None:  # a ResBlock without timesteps
            continue
        for weight in owner.get_submodule(name).parameters():
            parts = weight.reshape(weight.shape[0] // width, layer.units, -1)
            total = total + parts.abs().sum((0, 2))
    return total


# ---- sp ----


def sp(setup: Setup, router: PromptRouter) -> Tensor:
    """Units of small Taylor importance score low, (1, D). Fang et al., 2023."""
    return taylor_importance(setup)


def routed_sp(setup: Setup, router: PromptRouter) -> Tensor:
    """What matters least to a cluster of prompts scores low in its row, (N, D).

    Nothing is trained. The prompt embeddings are clustered, with clusters of like size, which
    `router` routes to; importance is that of each cluster's prompts, over `ROUTED_BATCHES` batches.
    """
    router.start_codes(setup.z, seed=setup.cfg.seed)
    return taylor_importance(setup, router.route(setup.z).cpu(), ROUTED_BATCHES)


# ---- obs ----


def obs(setup: Setup, router: PromptRouter) -> Tensor:
    """Units whose work the others of their layer can do score low, (1, D). `importance.py`."""
    return surgeon_scores(setup, sp(setup, router)[0], torch.arange(len(setup.z)))[None]


def routed_obs(setup: Setup, router: PromptRouter) -> Tensor:
    """The same for each of `routed_sp`'s clusters, on its own prompts' features, (N, D)."""
    importance = routed_sp(setup, router)  # (N, D)
    clusters = router.route(setup.z).cpu()
    rows = [(clusters == i).nonzero().flatten() for i in range(len(importance))]
    return torch.stack([surgeon_scores(setup, *own) for own in zip(importance, rows, strict=True)])


# ---- bksdm ----


def bksdm(setup: Setup, router: PromptRouter) -> Tensor:
    """Blocks that go in BK-SDM's order down to the budget score -inf, (1, D). Kim et al., 2023.

    T(a) says how many those are. What the expert turns out to take moves other units alone.

    Raises:
        ValueError: the space is not one of depth "all".
    """
    space = setup.space
    removed, following = blocks_to_remove(setup.cost, setup.cfg.budget)
    scores = relative_norms(setup.teacher.unet, space)
    beyond = scores.max() + 1  # more than two scores can differ by
    for layer in space.layers:
        if inside(layer, removed):
            scores[layer.span] = -torch.inf
        elif layer.kind == "depth":
            scores[layer.span] += beyond  # closed later than any width
        elif inside(layer, following):
            scores[layer.span] -= beyond  # closed earlier than the others
    return scores[None]


def blocks_to_remove(cost: CostModel, budget: float) -> tuple[list[str], list[str]]:
    """Names of the layers that go before the budget is undercut, and of the block next in line."""
    code, removed = torch.ones(cost.space.size), list[str]()
    starts = {layer.name: layer.start for layer in cost.space.depth_layers}
    for block in removal_order(cost.space):
        code[[starts[name] for name in block]] = 0
        if cost(code) < budget * cost.dense * (1 - ROUNDING):
            return removed, block
        removed += block
    return removed, []


def removal_order(space: ArchSpace) -> list[list[str]]:
    """BK-SDM's blocks, each a list of layers, in the order of removal: Base, then Small, then Tiny.

    Raises:
        ValueError: the space is not one of depth "all".
    """
    if space.depth != "all":
        raise ValueError(f'bksdm needs a space of depth "all", got {space.depth!r}')
    place = re.compile(r"(down|up)_blocks\.(\d+)\.(?:resnets|attentions)\.(\d+)")
    last: dict[tuple[str, int], int] = {}  # (side, stage) -> number of its last pair
    pairs: dict[tuple[str, int, int], list[str]] = {}  # (side, stage, pair) -> what can be removed
    for layer in space.layers:
        if found := place.match(layer.name):
            side, stage, pair = found[1], int(found[2]), int(found[3])
            last[side, stage] = max(pair, last.get((side, stage), 0))
            if layer.kind == "depth":
                pairs.setdefault((side, stage, pair), []).append(layer.name)
    stages = 1 + max(stage for side, stage in last if side == "down")
    inward = [
        block for i in range(stages) for block in (("down", stages - 1 - i), ("up", i))
    ]  # from the innermost stage outwards
    base = [
        (*block, pair)
        for block in inward
        for pair in range(1, last[block] + (block[0] == "down"))
        if (*block, pair) in pairs
    ]
    tiny = [key for key in sorted(pairs) if key[:2] in inward[:2] and key not in base]
    middle = [layer.name for layer in space.depth_layers if layer.name.startswith("mid_block.")]
    order = [*(pairs[key] for key in base), middle, *(pairs[key] for key in tiny)]
    return [block for block in order if block]


# ---- uni-arch ----


def uni_arch(setup: Setup, router: PromptRouter) -> Tensor:
    """Logits of one code that is trained for all prompts at once, (1, D). Sec. 4.3.

    The steps are those of Eq. 15 with N = 1, where routing has nothing to choose, and without the
    contrastive loss. They are logged and can be resumed, as those of `train.py`.

    Raises:
        UserError: the loss is no longer finite.
    """
    cfg = setup.cfg
    assert cfg.out
    steps = cfg.warmup_steps + cfg.joint_steps
    alone = replace(cfg, num_experts=1, lambda_cont=0.0, warmup_steps=0, joint_steps=steps)
    router, _ = optimise(replace(setup, cfg=alone))
    (cfg.out / CHECKPOINT).unlink()
    return router.codes.detach().cpu()


def routed_uni(setup: Setup, router: PromptRouter) -> Tensor:
    """`uni_arch`'s code for N experts, (1, D), which differ in their fine-tuning alone.

    They are fine-tuned on clusters of the prompt embeddings, the same as `routed_sp`'s.
    """
    router.start_codes(setup.z, seed=setup.cfg.seed)
    return uni_arch(setup, router)


METHODS: dict[str, Callable[[Setup, PromptRouter], Tensor]] = {
    "norm": norm,
    "sp": sp,
    "routed-sp": routed_sp,
    "obs": obs,
    "routed-obs": routed_obs,
    "bksdm": bksdm,
    "random": random,
    "uni-arch": uni_arch,
    "routed-uni": routed_uni,
    "dense": dense,
}

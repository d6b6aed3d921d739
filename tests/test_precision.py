"""Half precision, checkpointing and micro-batches change what a step costs, not what it learns."""

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import conditions_of
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import finetune
import importance
import losses
import train
from gates import binarize, gumbel_noise
from macs import measure_macs
from prune_unet import BlockRecorder, attach_gates, cut_expert, find_units
from router import PromptRouter
from settings import Finetuning, Pruning
from teacher.model import Noised

pytestmark = pytest.mark.parametrize("unet", ["sd2", "sdxl"], indirect=True)
B, N, DZ = 7, 3, 12
# Rounding to bfloat16 is off by up to 2^-8, to float16 by 2^-11, and by less than half of that on
# average. Some 30 roundings in a row, as good as independent, come to five times as much: 1 % and
# 0.12 %, of which these are twice. Losses are means over many elements and come closer. A gradient
# has been through the network twice, and gets three times the tolerance.
RTOL = {torch.bfloat16: 0.02, torch.float16: 0.0025}
HALVES = list(RTOL)


@pytest.fixture
def batch(unet, make_inputs) -> Noised:
    given = make_inputs(unet, B, seed=1)
    draw = torch.Generator().manual_seed(2)
    target = torch.randn(given["sample"].shape, generator=draw)
    return Noised(given["sample"], given["timestep"], conditions_of(given), target)


def in_type(unet: UNet2DConditionModel, batch: Noised, dtype: torch.dtype) -> tuple[Any, Noised]:
    """A teacher and a batch as `load_teacher` and `add_noise` give them in a precision."""
    try:
        nn.functional.conv2d(*torch.ones(2, 1, 1, 3, 3, dtype=dtype))
    except RuntimeError:
        pytest.skip(f"convolutions in {dtype} do not run on this CPU")
    model = copy.deepcopy(unet).to(dtype)
    teacher = SimpleNamespace(unet=model, dtype=dtype, device=torch.device("cpu"))
    conditions = batch.conditions.to("cpu", dtype)
    return teacher, Noised(batch.sample.to(dtype), batch.t, conditions, batch.target)


def gradients(model: nn.Module) -> Tensor:
    """All gradients of a model as one vector."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|"""
    return ((found - wanted).norm() / wanted.norm()).item()


def pruned(teacher: Any, batch: Noised, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of a pruning step, and the router's gradients."""
    torch.manual_seed(0)
    space = find_units(teacher.unet)
    router = PromptRouter(DZ, space.size, N)
    nn.init.normal_(router.codes)
    nn.init.normal_(router.keys)
    z = torch.randn(B, DZ)
    macs = measure_macs(teacher.unet, space, latent_size=8, text_tokens=5)
    gates = attach_gates(teacher.unet, space)
    # the image losses alone: the router's other terms are computed in float32 always
    alone = {"hold_budget": False, "lambda_res": 0.0, "lambda_cont": 0.0}
    cfg = Pruning(num_experts=N, batch_size=B, budget=0.6, **alone, **options)
    step = train.PruningStep(cfg, teacher, router, gates, macs)
    noise = gumbel_noise((B, space.size), generator=torch.Generator().manual_seed(5))
    terms = step(z, batch, noise, warmup=False)
    terms["loss"].backward()
    step.detach()
    return terms, gradients(router)


def tuned(
    teacher: Any, batch: Noised, *, checkpointing: bool = False, **options: Any
) -> tuple[dict[str, Tensor], Tensor, UNet2DConditionModel]:
    """The terms of a fine-tuning step, the expert's gradients, and the expert."""
    space = find_units(teacher.unet)
    logits = torch.randn(space.size, generator=torch.Generator().manual_seed(3)) + 1
    expert = cut_expert(teacher.unet, binarize(logits, space), space).float().requires_grad_(True)
    if checkpointing:
        expert.enable_gradient_checkpointing()
    recorders = (BlockRecorder(teacher.unet), BlockRecorder(expert))
    cfg = Finetuning(alpha_ddpm=1.0, **options)  # so that both terms weigh
    terms = finetune.finetuning_step(teacher, expert, recorders, batch, cfg)
    for recorder in recorders:
        recorder.detach()
    return terms, gradients(expert), expert


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_pruning_step_in_half_precision_is_close(unet, batch, dtype):
    wanted, slope = pruned(*in_type(unet, batch, torch.float32))
    terms, found = pruned(*in_type(unet, batch, dtype))
    for name in train.TERMS:
        assert terms[name].item() == pytest.approx(wanted[name].item(), rel=RTOL[dtype]), name
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    assert 0 < error(found, slope) < 3 * RTOL[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_finetuning_step_in_half_precision_is_close(unet, batch, dtype):
    wanted, slope, _ = tuned(*in_type(unet, batch, torch.float32))
    terms, found, expert = tuned(*in_type(unet, batch, dtype))
    for name in finetune.TERMS:
        assert terms[name].item() == pytest.approx(wanted[name].item(), rel=RTOL[dtype]), name
    assert torch.isfinite(found).all()
    assert 0 < error(found, slope) < 3 * RTOL[dtype]
    before = copy.deepcopy(expert.state_dict())
    torch.optim.AdamW(expert.parameters(), lr=1e-5).step()
    for name, weight in expert.named_parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32, name
    # such a step is less than half precision resolves: the weights must be float32 to take it
    steps = torch.cat([(w - before[name]).flatten() for name, w in expert.named_parameters()])
    assert (steps != 0).float().mean() > 0.9


def test_half_precision_keeps_the_gradients_of_a_large_batch(unet, batch, monkeypatch):
    """A sample's share of the paper's 1024 is less than float16 holds, without a scale."""
    found, scale = {}, losses.loss_scale
    for dtype, scaled in ((torch.float32, True), (torch.float16, True), (torch.float16, False)):
        teacher, inputs = in_type(unet, batch, dtype)
        gates = attach_gates(teacher.unet)
        space = gates.space
        router = PromptRouter(DZ, space.size, N)
        macs = measure_macs(teacher.unet, space, latent_size=8, text_tokens=5)
        step = train.PruningStep(Pruning(batch_size=1024), teacher, router, gates, macs)
        monkeypatch.setattr(losses, "loss_scale", scale if scaled else lambda _: 1 / 1024)
        a = torch.rand(1024, space.size, generator=torch.Generator().manual_seed(4))
        found[dtype, scaled] = step.image_losses(a, inputs, None, torch.arange(B))[2][:B]
    wanted = found[torch.float32, True]
    assert error(found[torch.float16, True], wanted) < 3 * RTOL[torch.float16]
    assert error(found[torch.float16, False], wanted) > 3 * RTOL[torch.float16]


def test_half_precision_loses_no_units_importance(unet, setup_of, batch, monkeypatch):
    """Where gradients are as small as in large networks; unscaled, many would be 0."""
    model = copy.deepcopy(unet)
    model.conv_out.weight.mul_(1e-3)
    rounded = copy.deepcopy(in_type(model, batch, torch.float16)[0].unet)

    def gradients_of(unet: UNet2DConditionModel) -> Tensor:
        setup = setup_of(unet, batch_size=6)
        return importance.gate_gradients(setup, 2).change  # (12, D)

    wanted, found = gradients_of(copy.deepcopy(rounded).float()), gradients_of(rounded)
    assert 0 < wanted.median() < 1e-4
    lost = (found == 0) & (wanted != 0)
    assert not lost.any() and error(found, wanted) < 6 * RTOL[torch.float16]
    monkeypatch.setattr(losses, "loss_scale", lambda _: 1.0)
    assert (gradients_of(rounded) == 0)[wanted != 0].float().mean() > 0.01


def test_checkpointed_finetuning_has_the_same_gradients(unet, batch):
    """In eval mode, in which diffusers leaves checkpointing to the flag alone."""
    teacher, inputs = in_type(unet, batch, torch.float32)
    calls: list[str] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, *_: calls.append(type(module).__name__)
    )
    terms, wanted, _ = tuned(teacher, inputs)
    once = calls.count("ResnetBlock2D")
    again, found, expert = tuned(teacher, inputs, checkpointing=True)
    hook.remove()
    twice = calls.count("ResnetBlock2D") - once
    assert once < twice < 2 * once  # the teacher's blocks are not computed again
    assert not expert.training and error(found, wanted) < 1e-6
    assert again["loss"].item() == terms["loss"].item()


def test_pruning_holds_one_copy_of_the_weights(unet, batch):
    """Teacher and gated U-Net are one module, and no kernel is made beside its own."""
    teacher, inputs = in_type(unet, batch, torch.float32)
    forwards: list[int] = []

    def kernels() -> set[int]:
        alive = [p for p in gc.get_objects() if isinstance(p, nn.Parameter)]
        return {id(p) for p in alive if p.ndim == 4 and p.device.type == "cpu"}

    before = kernels()

    def look(module: nn.Module, *_: Any) -> None:
        forwards.append(id(module))
        assert not kernels() - before

    hook = teacher.unet.register_forward_hook(look)
    pruned(teacher, inputs)
    hook.remove()
    assert forwards == [id(teacher.unet)] * 2

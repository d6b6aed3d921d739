"""Fine-tuning: one step against Eq. 30 written out, and what many steps do to an expert."""

import copy
import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import ROWS, conditions_of, tiny_teacher
from diffusers import UNet2DConditionModel
from torch import Tensor

import finetune
from common.errors import UserError
from common.files import load_tensors
from common.randomness import batch_rows, step_generator
from gates import ArchSpace, binarize
from prune_unet import BlockRecorder, attach_gates, cut_expert, find_units, load_expert
from run import load_shared, shared_path
from settings import Finetuning
from teacher.conditions import Conditions
from teacher.encoded import Encoded
from teacher.model import Noised, Teacher, add_noise

B = 5
EMPTY = Conditions(torch.full((1, 5, 16), 7.0))


def code_of(space: ArchSpace) -> Tensor:
    """A code that closes a third of the units."""
    logits = torch.rand(space.size, generator=torch.Generator().manual_seed(3))
    return binarize(logits, space, threshold=1 / 3)


def blocks_and_output(unet: UNet2DConditionModel, batch: Noised) -> tuple[list[Tensor], Tensor]:
    recorder = BlockRecorder(unet)
    output = unet(**batch.inputs()).sample
    blocks = recorder.take()
    recorder.detach()
    return blocks, output


def eq_30(
    teacher: Teacher, expert: UNet2DConditionModel, batch: Noised, cfg: Finetuning
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 30 of a batch, and its two terms, from the paper; the teacher is a constant."""
    with torch.no_grad():
        wanted_blocks, wanted = blocks_and_output(teacher.unet, batch)
    blocks, output = blocks_and_output(expert, batch)
    terms = []
    for b in range(len(batch.sample)):
        denoising = ((output[b] - batch.target[b]) ** 2).mean()
        distillation = ((output[b] - wanted[b]) ** 2).mean()
        for s, t in zip(blocks, wanted_blocks, strict=True):
            error = ((s[b] - t[b]) ** 2).mean()
            if cfg.normalise_blocks:
                error = error / (t[b] ** 2).mean() / len(blocks)
            distillation = distillation + cfg.block_weight * error
        terms.append(torch.stack([denoising, distillation]))
    denoising, distillation = torch.stack(terms).mean(0)
    return cfg.alpha_ddpm * denoising + cfg.alpha_distill * distillation, denoising, distillation


def step(
    teacher: Teacher, expert: UNet2DConditionModel, batch: Noised, cfg: Finetuning
) -> dict[str, Tensor]:
    recorders = (BlockRecorder(teacher.unet), BlockRecorder(expert))
    terms = finetune.finetuning_step(teacher, expert, recorders, batch, cfg)
    for recorder in recorders:
        recorder.detach()
    return terms


@pytest.fixture
def encoded(make_inputs, smallest) -> Encoded:
    inputs = make_inputs(smallest, ROWS, seed=3)
    return Encoded(inputs["sample"], conditions_of(inputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha_ddpm": 1.0, "alpha_distill": 0.3, "micro_batch": 2, "block_weight": 0.2},
        {"normalise_blocks": False},
    ],
    ids=str,
)
def test_a_step_has_the_gradients_of_eq_30(unet, make_inputs, options):
    teacher, cfg = tiny_teacher(unet), Finetuning(**options)
    inputs, draw = make_inputs(unet, B), torch.Generator().manual_seed(0)
    batch = add_noise(teacher, inputs["sample"], conditions_of(inputs), draw)
    space = find_units(unet)
    expert = cut_expert(unet, code_of(space), space).requires_grad_(True)
    terms = step(teacher, expert, batch, cfg)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in expert.parameters()]
    wanted = eq_30(teacher, expert, batch, cfg)
    for name, value in zip(("loss", "denoising", "distillation"), wanted, strict=True):
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
    gradients = torch.autograd.grad(wanted[0], list(expert.parameters()), allow_unused=True)
    size = max(g.abs().max().item() for g in gradients if g is not None)
    assert size > 1e-4
    for ours, oracle in zip(found, gradients, strict=True):
        oracle = torch.zeros_like(ours) if oracle is None else oracle
        assert torch.allclose(ours, oracle, atol=1e-5 * size, rtol=1e-3)
    assert all(p.grad is None for p in teacher.unet.parameters())


def tune(cfg, folder, i, teacher, code, encoded, rows) -> None:
    """Fine-tune expert `i`, whose rows these are; nothing is refitted."""
    space = find_units(teacher.unet)
    experts = torch.full((ROWS,), i + 1)
    experts[rows] = i
    task = finetune.Task(
        cfg=dataclasses.replace(cfg, refit=False),
        run=folder,
        teacher=teacher,
        dense=teacher.unet,
        space=space,
        codes=code.expand(i + 2, -1),
        experts=experts,
        data=encoded,
        empty=EMPTY,
    )
    finetune.finetune_expert(task, i)


def test_a_run_of_one_step_moves_weights_down_the_gradient(smallest, encoded, tmp_path):
    """AdamW's first step is -lr times the gradient's sign, beside its weight decay."""
    teacher, space = tiny_teacher(smallest), find_units(smallest)
    before = {name: w.clone() for name, w in smallest.named_parameters()}
    cfg = Finetuning(steps=1, batch_size=B, lr=1e-3, caption_dropout=0.5)
    rows = torch.arange(3, ROWS)
    code = code_of(space)
    tune(cfg, tmp_path, 2, teacher, code, encoded, rows)
    tuned, meta = load_expert(tmp_path / "experts" / "2.safetensors")
    assert meta["expert"] == 2 and meta["rows"] == len(rows)
    assert all(torch.equal(w, before[name]) for name, w in smallest.named_parameters())

    draw = step_generator(cfg.seed, "finetune 2", 0)
    pick = rows[batch_rows(len(rows), B, cfg.seed, 0)]
    dropped = torch.rand(B, generator=draw) < 0.5
    assert 0 < dropped.sum() < B
    own, empty = encoded.conditions.text, EMPTY.text[0]
    text = [empty if gone else own[row] for gone, row in zip(dropped, pick, strict=True)]
    batch = add_noise(teacher, encoded.latents[pick], Conditions(torch.stack(text)), draw)
    expert = cut_expert(smallest, code, space).requires_grad_(True)
    eq_30(teacher, expert, batch, cfg)[0].backward()
    sure = 0
    for (name, old), new in zip(expert.named_parameters(), tuned.parameters(), strict=True):
        known = old.grad.abs() > 1e-5
        moved = new - old.detach() * (1 - 0.01 * cfg.lr)
        expected = -cfg.lr * old.grad[known].sign()
        assert torch.allclose(moved[known], expected, rtol=1e-2, atol=1e-6), name
        sure += int(known.sum())
    assert sure > 0.5 * sum(p.numel() for p in expert.parameters())


def test_many_steps_bring_the_expert_to_the_teacher(smallest, encoded, tmp_path):
    teacher, space = tiny_teacher(smallest), find_units(smallest)
    cfg = Finetuning(steps=30, batch_size=6, lr=2e-3)
    rows = torch.arange(ROWS)
    code = code_of(space)
    tune(cfg, tmp_path, 0, teacher, code, encoded, rows)
    with (tmp_path / "experts" / "0.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(30))
    first, last = finetune.first_and_last(tmp_path, "0")
    assert last < 0.7 * first
    tuned, _ = load_expert(tmp_path / "experts" / "0.safetensors")
    batch = add_noise(
        teacher, encoded.latents, encoded.conditions, torch.Generator().manual_seed(9)
    )
    with torch.no_grad():
        wanted = smallest(**batch.inputs()).sample
        distances = [
            ((unet(**batch.inputs()).sample - wanted) ** 2).mean().item()
            for unet in (cut_expert(smallest, code, space), tuned)
        ]
    assert distances[1] < 0.7 * distances[0]


# ---- refitted, and shared ----


@pytest.fixture
def task_of(smallest, encoded, tmp_path):
    """task_of(...): a task of three experts, the last without prompts."""

    def make(**options) -> finetune.Task:
        space = find_units(smallest)
        draw = torch.Generator().manual_seed(7)
        codes = torch.stack(
            [binarize(torch.randn(space.size, generator=draw) + 0.5, space) for _ in range(3)]
        )
        cfg = Finetuning(**{"steps": 0, "batch_size": B, "refit_images": 32, **options})
        return finetune.Task(
            cfg=cfg,
            run=tmp_path,
            teacher=tiny_teacher(smallest),
            dense=smallest,
            space=space,
            codes=codes,
            experts=torch.arange(ROWS) % 2,
            data=encoded,
            empty=EMPTY,
        )

    return make


def test_a_refitted_expert_is_its_code_and_what_was_solved(task_of, smallest):
    """Its file lacks the teacher's weights, which `load_expert` cuts out of the teacher."""
    task = task_of()
    before = {name: w.clone() for name, w in smallest.named_parameters()}
    finetune.finetune_expert(task, 1)
    path = task.run / "experts" / "1.safetensors"
    tensors, header = load_tensors(path)
    assert tensors.keys() == finetune.refitted(task, 1).keys() and len(tensors) > 5
    assert header["code"] == task.codes[1].int().tolist()
    expert, _ = load_expert(path, dense=smallest)
    cut = cut_expert(smallest, task.codes[1], task.space)
    for name, weight in expert.named_parameters():
        assert torch.equal(weight, tensors.get(name, cut.get_parameter(name))), name
    assert all(torch.equal(w, before[name]) for name, w in smallest.named_parameters())
    with pytest.raises(UserError, match="not an expert"):
        load_expert(path)


def test_refitting_is_not_done_again_but_for_other_settings(task_of, monkeypatch):
    task = task_of()
    first = finetune.refitted(task, 0)
    monkeypatch.setattr(finetune, "refit", lambda *_: pytest.fail("it was refitted again"))
    again = finetune.refitted(task, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = dataclasses.replace(task, cfg=dataclasses.replace(task.cfg, ridge=0.5))
    with pytest.raises(pytest.fail.Exception):
        finetune.refitted(other, 0)


def test_training_starts_at_the_refitted_weights(task_of, smallest, monkeypatch):
    task, seen = task_of(steps=1), []
    wanted = finetune.refitted(task, 0)
    monkeypatch.setattr(
        finetune, "optimise", lambda _, student, *__: seen.append(student.state_dict())
    )
    finetune.finetune_expert(task, 0)
    assert all(torch.equal(seen[0][name], w) for name, w in wanted.items())
    tensors, _ = load_tensors(task.run / "experts" / "0.safetensors")
    assert tensors.keys() == seen[0].keys()  # all weights
    assert not list((task.run / "experts").glob("*refit*"))


def test_an_expert_without_prompts_is_refitted_on_all(task_of):
    task = task_of()
    assert task.rows_of(2).tolist() == list(range(ROWS))
    assert task.rows_of(1).tolist() == list(range(1, ROWS, 2))
    finetune.finetune_expert(task, 2)
    assert load_tensors(task.run / "experts" / "2.safetensors")[1]["rows"] == ROWS


def test_a_step_of_shared_weights_is_eq_30_of_each_samples_own_expert(task_of, smallest):
    """The gradient with respect to the dense weights, one sample through one cut expert each."""
    task = task_of(micro_batch=4)
    student = copy.deepcopy(smallest).requires_grad_(True)
    gates, rows = attach_gates(student, task.space), torch.arange(B)
    batch = task.batch(rows, torch.Generator().manual_seed(3))
    recorders = BlockRecorder(smallest), BlockRecorder(student)
    own = (gates, task.codes[task.experts[rows]])
    terms = finetune.finetuning_step(task.teacher, student, recorders, batch, task.cfg, own)
    gates.detach()
    for recorder in recorders:
        recorder.detach()
    losses, total = [], torch.zeros_like(smallest.conv_in.weight)
    for row in range(B):
        code = task.codes[task.experts[row]]
        expert = cut_expert(smallest, code, task.space).requires_grad_(True)
        part = batch.part(torch.tensor([row]))
        losses.append(eq_30(task.teacher, expert, part, task.cfg)[0])
        # conv_in is in every expert, whole
        (gradient,) = torch.autograd.grad(losses[-1], expert.conv_in.weight)
        total += gradient / B
    assert terms["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    found = student.conv_in.weight.grad
    assert torch.allclose(found, total, atol=1e-5 * total.abs().max().item(), rtol=1e-3)


def test_shared_weights_are_trained_once_and_cut_for_each_expert(task_of, smallest):
    task = task_of(shared=True, steps=3, lr=1e-3)
    finetune.finetune_shared(task)
    shared = load_shared(task.run, smallest, task.codes)
    moved = (shared.conv_in.weight - smallest.conv_in.weight).abs().max()
    assert 0 < moved < 0.01
    with pytest.raises(UserError, match="other experts"):
        load_shared(task.run, smallest, 1 - task.codes)
    again = dataclasses.replace(task, dense=shared, cfg=dataclasses.replace(task.cfg, shared=False))
    finetune.finetune_expert(again, 0)  # from there on, apart
    expert, _ = load_expert(task.run / "experts" / "0.safetensors")
    start = cut_expert(shared, task.codes[0], task.space)
    pairs = list(zip(expert.parameters(), start.parameters(), strict=True))
    assert all((new - old).abs().max() < 0.01 for new, old in pairs)


def test_shared_weights_are_read_where_they_lie(task_of, smallest):
    """They take no memory that the system could not take back: their file is mapped."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not show what is mapped")
    task = task_of(shared=True, steps=1)
    finetune.finetune_shared(task)
    shared, file = load_shared(task.run, smallest, task.codes), shared_path(task.run)
    lines = [line.split()[0] for line in maps.read_text().splitlines() if str(file) in line]
    spans = [[int(end, 16) for end in line.split("-")] for line in lines]
    for weight in shared.parameters():
        assert any(start <= weight.data_ptr() < end for start, end in spans)


def test_what_would_change_nothing_or_not_be_used_is_refused(tmp_path):
    """Zero steps of shared weights, of experts cut out of them, or without a refit."""
    finetune.check_use(Finetuning(steps=0), tmp_path, 2)
    for options in ({"shared": True}, {"refit": False}):
        with pytest.raises(UserError, match="--steps 0 would change nothing"):
            finetune.check_use(Finetuning(steps=0, **options), tmp_path, 2)
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "1.safetensors").touch()
    with pytest.raises(UserError, match=r"experts/1\.safetensors would be used instead"):
        finetune.check_use(Finetuning(shared=True), tmp_path, 2)
    (tmp_path / "experts" / "shared.safetensors").touch()
    finetune.check_use(Finetuning(shared=True), tmp_path, 2)  # it was there before the experts
    with pytest.raises(UserError, match="has shared weights"):
        finetune.check_use(Finetuning(steps=0), tmp_path, 2)

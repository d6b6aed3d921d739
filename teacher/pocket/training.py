"""A model in training: its optimizers, its moving average, its checkpoint, its curves.

`teacher/pocket/pretrain.py` trains the pocket teacher's autoencoder and U-Net with it.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.checkpoint import Checkpoint


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, constant, linear decay to a hundredth over the last two fifths."""
    decay = min(1.0, (steps - step) / (0.4 * steps))
    return peak * min(1.0, (step + 1) / warmup) * max(decay, 0.01)


class Training:
    """A model with its optimizers and moving average, saved and restored as one file.

    Args:
        muon: names of the parameters that Muon (Jordan et al. 2024) updates; a convolution's kernel
            (out, in, h, w) counts as the matrix (out, in h w). AdamW updates the others.
        images: those that the model has seen before this training.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        ema_decay: float,
        muon: frozenset[str] = frozenset(),
        images: int = 0,
    ) -> None:
        self.model = model
        named = dict(model.named_parameters())
        self.kernels = [p for name, p in named.items() if name in muon]
        # parameters of their own over the same memory, because Muon takes matrices alone
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.kernels]
        others = [p for name, p in named.items() if name not in muon]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, lr=1e-3, fused=True)
        }
        if muon:
            self.optimizers["muon"] = torch.optim.Muon(
                self.matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        self.checkpoint = Checkpoint(
            path, {"model": self.model, "ema": self.ema, **self.optimizers}
        )
        meta = self.checkpoint.restore() or {"step": 0, "images": images}
        self.step, self.images = meta["step"], meta["images"]

    def save(self) -> None:
        self.checkpoint.save(step=self.step, images=self.images)

    def update(self, loss: Tensor, rate: float, images: int) -> None:
        loss.backward()
        advice = "try a lower learning rate"
        self.checkpoint.guard(self.step, loss.item(), self.model.parameters(), advice)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.ema.update_parameters(self.model)
        self.step += 1
        self.images += images


def plot_curves(columns: Mapping[Path, str], path: Path) -> None:
    """A column of each log, smoothed, side by side as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(columns), figsize=(4.5 * len(columns), 3), layout="constrained", squeeze=False
    )
    for axis, (log, column) in zip(axes.flat, columns.items(), strict=True):
        with log.open(newline="", encoding="utf-8") as file:
            rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file)]
        width = max(1, len(rows) // 100)
        means = [
            sum(value for _, value in rows[i : i + width]) / len(rows[i : i + width])
            for i in range(0, len(rows), width)
        ]
        axis.plot([step for step, _ in rows[::width]], means)
        axis.set(title=f"{log.stem}: {column}", xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=80)
    plt.close(figure)

"""The training loop: the only one. Stages differ in roles, rates and loss weights."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lib.base.device import product_type
from lib.base.errors import NonFiniteError, ParamsError
from lib.base.workers import is_main, rank, total, wait_for_everyone, world_size
from lib.model.linear import ParameterRole
from lib.objective.loss import Batch, Batches, Loss, LossModule, LossSums, held_out_loss
from lib.params.training import LoopConfig
from lib.quant.codebook import project_learned
from lib.train.average import Kept, Values, restore
from lib.train.diagnose import first_bad
from lib.train.parallel import (
    gathered,
    no_exchange,
    parallel,
    part_of,
    whole,
    without_parameters,
)
from lib.train.penalty import MakePenalty, no_penalty
from lib.train.roles import (
    Trainable,
    current,
    role_rates,
    select,
    settle_after,
    settle_before,
)
from lib.train.schedule import rate_factor, rows_of
from lib.train.state import Progress, load_state, save_state

_GPU_STEPS_UNSEEN = 10

Report = Callable[[Progress], None]
"""Called after every step."""


@dataclass
class TrainResult:
    """Outcome of a run."""

    model: PreTrainedModel
    """Holds the parameters of ``progress.best_step``; the one given, unless that was sharded."""
    progress: Progress
    trained: int
    """Number of values that trained."""
    plain: Values
    """With EMA the parameters of that step that were not averaged, on the CPU; else empty."""


class Trainer:
    """One run over one set of sequences. Bit-exact resume: state is saved every
    ``checkpoint_every``.

    Args:
        loss: of ``model`` on a batch of ``train``; ``val`` is judged by its held-out term.
        trainables: what trains; None = all that ``params`` allow.
        penalty: makes what is added to the loss, or done to parameters after a step.
        patience: stop after so many evaluations in a row that found nothing better; 0 = never.
        shard: several processes hold parts of the model, not copies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        params: LoopConfig,
        loss: Loss,
        train: Batches,
        val: Batches,
        device: torch.device,
        scratch: Path,
        *,
        trainables: list[Trainable] | None = None,
        penalty: MakePenalty = no_penalty,
        patience: int = 0,
        shard: bool = False,
    ) -> None:
        if params.dtype == "fp16" and device.type == "cpu":
            raise ParamsError("dtype fp16 has no use on the CPU; use fp32 or bf16 there")
        if params.dtype == "fp16" and shard:
            raise ParamsError("dtype fp16 does not go with run.shard; use bf16")
        if world_size() > params.batch_size:
            raise ParamsError(
                f"{world_size()} processes cannot share a batch of {params.batch_size} sequences; "
                "raise batch_size or lower run.processes"
            )
        random.seed(params.seed)
        np.random.seed(params.seed)
        torch.manual_seed(params.seed)
        model.to(device)  # type: ignore[arg-type]
        self.model, self.params, self.loss, self.patience = model, params, loss, patience
        self.train_data, self.val_data, self.device = train, val, device
        self.products = product_type(params.dtype, device)
        self.state_folder = scratch / "state"
        self.trainables = select(model, params) if trainables is None else trainables
        settle_before(self.trainables)
        self.penalty = penalty(model, self.trainables, params)
        if params.gradient_checkpointing:
            # the embeddings are frozen: reentrant checkpointing would find no gradient to start
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # Transformers checkpoints only in training mode
        self.empty = without_parameters(model) if shard and world_size() > 1 else None
        self.module = parallel(LossModule(model, loss), device, shard=shard)
        if self.empty is not None:
            self.trainables = current(self.trainables, model)
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(enabled=params.dtype == "fp16" and device.type == "cuda")
        self.progress = Progress()
        # asking a GPU for a number makes both wait: there losses are looked at every few steps
        self.waits = device.type == "cuda"
        self.kept = Kept(params.ema)

    def _make_optimizer(self) -> torch.optim.AdamW:
        rates = role_rates(self.params)
        groups = []
        for role in ParameterRole:
            members = [t.parameter for t in self.trainables if t.role is role]
            if members:
                groups.append({"params": members, "lr": rates[role], "base_lr": rates[role]})
        return torch.optim.AdamW(
            groups,
            weight_decay=self.params.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.products is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.products)

    def _first_bad(self, loss: Loss, batches: Iterable[Batch]) -> str:
        return first_bad(self.model, loss, batches, self._autocast)

    def held_out_loss(self) -> float:
        """Mean of the held-out term over the first ``eval_sequences`` held-out sequences."""
        count = self.params.eval_sequences
        with self._autocast():
            loss = held_out_loss(self.model, self.loss, self.val_data, count, self.device)
        if not math.isfinite(loss):
            rows = range(min(count, len(self.val_data)))
            batches = (self.val_data.batch(np.array([row])).to(self.device) for row in rows)
            where = self._first_bad(self.loss.measured(), batches)
            raise NonFiniteError(f"held-out loss is {loss} at step {self.progress.step}: {where}")
        return loss

    def _evaluate(self) -> dict[str, float]:
        """Columns of the log: held-out losses of the averaged parameters (of the plain ones without
        EMA) and what the penalty measures."""
        with self.kept.evaluated(self.trainables):
            columns = self.penalty.measure(self.held_out_loss, self._judged_by)
        loss = columns[self._judged_by]
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
            self.kept.keep(self.trainables)
        self.progress.last_loss = loss
        return columns

    @property
    def _judged_by(self) -> str:
        """The column that chooses the best step."""
        return f"val_{self.loss.name}_loss"

    def _batches(self, step: int) -> Iterator[Batch]:
        """This process's share of each micro-batch of a step, on the CPU."""
        accumulate, size = self.params.grad_accum, self.params.batch_size
        for part in range(accumulate):
            rows = rows_of(step * accumulate + part, size, len(self.train_data), self.params.seed)
            yield self.train_data.batch(rows[rank() :: world_size()])

    def _backward(self, batches: list[Batch]) -> Tensor:
        """Gradients of the mean over all positions of all processes; returns that and the mean of
        the held-out term."""
        count = torch.stack([batch.mask.sum() for batch in batches]).sum()
        positions = total(count.to(self.device)).clamp_min(1).float()
        means = torch.zeros(2, device=self.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else no_exchange(self.module):
                with self._autocast():
                    sums: LossSums = self.module(batch.to(self.device))
                # the processes' gradients are averaged, and their sum is wanted
                self.scaler.scale(sums.total * world_size() / positions).backward()
            means += torch.stack([sums.total.detach().float(), sums.held.float()]) / positions
        return total(means)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its log row, on a GPU with values still to be waited for."""
        step = self.progress.step
        factor = rate_factor(step, self.params)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        batches = list(self._batches(step))
        loss, held = self._backward(batches)
        self.scaler.unscale_(self.optimizer)
        self.penalty.after_backward()
        limit = self.params.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_([t.parameter for t in self.trainables], limit)
        row = {
            "step": step + 1,
            "loss": loss,
            f"{self.loss.name}_loss": held,
            "rate_factor": factor,
            "gradient_norm": norm,
        }
        if not self.waits:
            self._check(row, batches)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.penalty.after_step(factor)
        self._after_update()
        self.progress.step += 1
        return row

    def _check(self, row: dict[str, Any], batches: list[Batch]) -> None:
        """Turn a row's tensors into numbers.

        Raises:
            NonFiniteError: the loss is not finite, or the gradient where no scaler skips it.
        """
        for key in ("loss", f"{self.loss.name}_loss", "gradient_norm"):
            row[key] = float(whole(row[key]))
        if not math.isfinite(row["loss"]):
            moved = (batch.to(self.device) for batch in batches)
            raise NonFiniteError(
                f"loss is {row['loss']} at step {row['step']}: {self._first_bad(self.loss, moved)}"
            )
        if math.isfinite(row["gradient_norm"]):
            return
        if self.scaler.is_enabled():
            row["gradient_norm"] = None  # the scaler skips such a step
            return
        bad = [
            t.name
            for t in self.trainables
            if t.parameter.grad is not None and not whole(t.parameter.grad).isfinite().all()
        ]
        # each can be finite and their norm not
        where = f"gradient of {bad[0]}" if bad else "the norm of all gradients"
        raise NonFiniteError(f"{where} is not finite at step {row['step']}")

    @torch.no_grad()
    def _after_update(self) -> None:
        for item in self.trainables:
            if item.role is ParameterRole.LUT:
                learned = project_learned(whole(item.parameter))
                item.parameter.copy_(part_of(learned, item.parameter))
        self.kept.follow(self.trainables)

    def _save(self) -> None:
        extra = self.kept.tensors()
        extra.update({f"penalty.{name}": value for name, value in self.penalty.state().items()})
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            values = [state["scale"], state["_growth_tracker"]]
            extra["scaler"] = torch.tensor(values, dtype=torch.float64)
        save_state(self.state_folder, self.trainables, self.optimizer, self.progress, extra)
        wait_for_everyone()

    def _resume(self) -> bool:
        loaded = load_state(self.state_folder, self.trainables, self.optimizer)
        if loaded is None:
            return False
        self.progress, extra = loaded
        if "scaler" in extra:
            scale, tracker = extra["scaler"].tolist()
            values = {"scale": scale, "_growth_tracker": int(tracker)}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **values})
        self.kept.load(extra, self.trainables)
        state = {
            k.removeprefix("penalty."): v for k, v in extra.items() if k.startswith("penalty.")
        }
        self.penalty.load(state)
        return True

    def _stalled(self) -> bool:
        """Whether the last ``patience`` evaluations found nothing better."""
        if not self.patience:
            return False
        key = self._judged_by
        measured = [row["step"] for row in self.progress.rows if row.get(key) is not None]
        since = sum(1 for step in measured if int(step or 0) > self.progress.best_step)
        return since >= self.patience

    def _start(self) -> None:
        """What a run that does not resume begins with."""
        self.kept.start(self.trainables)
        self.progress.rows.append({"step": 0, **self._evaluate()})
        self.progress.initial_loss = self.progress.last_loss

    def run(self, report: Report) -> TrainResult:
        """Train to the last step and leave the best parameters in the model.

        Raises:
            NonFiniteError: a loss or gradient is not finite; names step and layer. The last
                saved state stays on disk.
        """
        params = self.params
        if not self._resume():
            self._start()
        elif is_main():
            print(f"going on after step {self.progress.step} of {params.steps}", file=sys.stderr)
        waiting: list[dict[str, Any]] = []
        while self.progress.step < params.steps and not self._stalled():
            row = self.train_step()
            step, last = self.progress.step, self.progress.step == params.steps
            evaluates = step % params.eval_every == 0 or last
            saves = step % params.checkpoint_every == 0 and not last
            waiting.append(row)
            if self.waits and not (evaluates or saves or len(waiting) == _GPU_STEPS_UNSEEN):
                continue
            for seen in waiting:
                if self.waits:
                    self._check(seen, [])
                self.progress.rows.append(seen)
            waiting.clear()
            if evaluates:
                row.update(self._evaluate())
            if saves:
                self._save()
            report(self.progress)
        plain = self.kept.whole_plain()
        restore(self.trainables, self.kept.best)
        self.penalty.finish()
        model = self.model
        if self.empty is not None:
            model = gathered(self.model, self.empty)
            self.trainables = current(self.trainables, model)
        settle_after(self.trainables)
        model.eval()
        model.requires_grad_(False)
        trained = sum(t.parameter.numel() for t in self.trainables)
        return TrainResult(model, self.progress, trained, plain)

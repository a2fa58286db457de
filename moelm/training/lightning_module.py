"""The training step under Lightning: loss, balancing, statistics, and what a checkpoint must remember."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moelm.config import Config, ConfigError, build
from moelm.model.gpt import GPT, GPTOutput
from moelm.model.init import initialize
from moelm.model.size import flops_per_token
from moelm.moe.balancing.base import Balancer, auxiliary_losses
from moelm.moe.load_metrics import dead_experts, max_violation
from moelm.training.bad_steps import BadStepError, Evidence, LossSpikeError, NonFiniteError, RecentLosses
from moelm.training.checkpoint_io import continue_together, step_of
from moelm.training.evaluation import Evaluation, EvaluationSums, forward_batch
from moelm.training.gradient_clipping import clip_gradients, is_finite, tensor_norms
from moelm.training.optim import build_optimizer, lr_factor, parameter_names, place_gradients
from moelm.training.preemption import Preempted, exit_code, received, requeue
from moelm.training.rng import rng_state, seed_rank, set_rng_state
from moelm.training.shards import held_part, local
from moelm.training.statistics import (
    RecentLoad,
    StepAccumulator,
    StepReports,
    StepStatistics,
    all_reduce_sums,
    gather,
    world_size,
)
from moelm.training.strategies import ShardedStrategy, why_no_cuda_graphs


class MoELightningModule(pl.LightningModule):
    """One optimizer step = `accumulation` micro-batches; everything that is counted is counted per step.

    Callbacks read `step`, `last_step`, `recent_load`, `evaluation` and `latest`, and change nothing.
    """

    def __init__(self, config: Config, domains: list[str], end_of_text: int) -> None:
        super().__init__()
        self.config = config
        self.domains = domains
        self.document_separator = end_of_text if config.data.mask_documents else None
        self.model: GPT
        moe = config.model.moe
        self.balancers: list[Balancer] = (
            [build("balancer", balancer) for balancer in moe.balancers] if moe and config.model.moe_layers else []
        )
        self.accumulator = StepAccumulator()
        self.last_step: StepStatistics | None = None
        self.recent_load = RecentLoad()
        self.bias_update_ME: Tensor | None = None  # what the last optimizer step added to expert_bias
        self.grad_norm: Tensor | None = None
        self.lr = 0.0
        self.evaluation: dict[str, Evaluation] = {}
        self.evaluation_sums: EvaluationSums | None = None
        self.latest: dict[str, float] = {}  # every scalar by tag, as last logged
        self.paused_s = 0.0  # time in validation and saving, which is no training
        self.flops_per_token = flops_per_token(config.model, config.data.seq_len)
        self._rng_to_restore: dict[str, Any] | None = None
        self.continued: Path | None = None  # the checkpoint that this rank found; set it before `fit`
        self._step_before_batch = 0
        self._is_first_micro_batch = True  # of its optimizer step
        self.must_stop = False  # one rank was told to end, and all know: this step is saved, and the run ends
        self.n_skipped = 0  # steps left out in this run
        self._recent_losses = RecentLosses()
        self._reports = StepReports()
        self._asked = StepReports()  # the same between batches of a validation
        self._validation_due = False  # the one after this step has not ended
        self.is_late_validation = False  # the one in which the run before was told to end

    # ------------------------------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Where the ranks first meet. Raises CheckpointError if they do not mean the same checkpoint."""
        continue_together(self.continued)

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        with torch.device("meta"):
            model = GPT(self.config.model)
        strategy = self.trainer.strategy if self._trainer else None
        device = torch.device("cpu") if strategy is None else strategy.root_device
        options = self.config.trainer
        model.activation_checkpointing = options.activation_checkpointing
        if options.compile in (True, "cuda_graphs") or (options.compile == "auto" and device.type == "cuda"):
            graphs = strategy is not None and options.compile is not True and not why_no_cuda_graphs(self.trainer)
            if options.compile == "auto":  # with both it was not tried
                graphs &= self.trainer.accumulate_grad_batches == 1 or not isinstance(strategy, ShardedStrategy)
            model.compile_blocks(cuda_graphs=graphs)
        if isinstance(strategy, ShardedStrategy):
            strategy.shard(model)
        try:
            model.to_empty(device=device)
        except (RuntimeError, MemoryError):
            n_bytes = 4 * sum(local(parameter).numel() for parameter in model.parameters())
            problem = f"its weights take {n_bytes / 2**30:,.1f} GiB, which {device} does not have"
            raise ConfigError("model", problem, "a smaller model; see python -m moelm.info --config") from None
        initialize(model, self.config.run.seed, held_part)
        self.model = model

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.config
        optimizer = build_optimizer(self.model, config.optim)
        self._numbers = [{**group, "params": None} for group in optimizer.param_groups]
        # FSDP2 adds those of several devices in float32, and by autograd's hooks
        if config.trainer.precision == "bf16-mixed" and not isinstance(self.trainer.strategy, ShardedStrategy):
            place_gradients(self.model, optimizer, self.trainer.accumulate_grad_batches, self.trainer.world_size)
        scheduler = LambdaLR(optimizer, lr_factor(config.optim.schedule, config.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def expert_bias_ME(self) -> Tensor | None:
        """A copy of the routers' expert_bias, stacked; None where no router has one."""
        biases = [getattr(layer.router, "expert_bias", None) for layer in self.model.moe_layers]
        present = [bias for bias in biases if bias is not None]
        return torch.stack(present) if present else None

    # ---------------------------------------------------------------------------------------- training

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.global_step)

    @property
    def batch_samples(self) -> int:
        """Sequences an optimizer step, over all ranks."""
        return self.config.optim.batch_tokens // self.config.data.seq_len

    def on_fit_start(self) -> None:
        first_step = 0 if self.continued is None else step_of(self.continued)  # `fsdp` loads it later
        seed_rank(self.config.run.seed, self.global_rank, first_step)

    def on_train_start(self) -> None:
        """A checkpoint brings the numbers that the optimizer had; those of the config count."""
        scheduler: Any = self.lr_schedulers()
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, numbers in zip(self.trainer.optimizers[0].param_groups, self._numbers, strict=True):
            group |= {**numbers, "params": group["params"], "initial_lr": numbers["lr"], "lr": numbers["lr"] * factor}
        scheduler.base_lrs = [numbers["lr"] for numbers in self._numbers]
        if self._validation_due:
            self._validate()
        self.trainer.fit_loop.epoch_loop.max_steps = self.config.trainer.max_steps  # see `train`

    def _validate(self) -> None:
        """What Lightning does after a step at which a validation is due."""
        trainer = self.trainer
        trainer.validating, first = True, trainer._logger_connector._first_loop_iter
        self.is_late_validation = True
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        trainer.fit_loop.epoch_loop.val_loop.run()
        self.is_late_validation = False
        trainer.training, trainer._logger_connector._first_loop_iter = True, first

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._step_before_batch = self.step
        self._is_first_micro_batch = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self._rng_to_restore is not None:  # last of all, since building loaders and models draws numbers
            set_rng_state(self._rng_to_restore)
            self._rng_to_restore = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = forward_batch(self.model, batch, self.document_separator)
        assert output.loss is not None
        losses = {}
        if output.stats is not None:
            needs_window = any(balancer.scope == "global" for balancer in self.balancers)
            window_ME = self.accumulator.window(output.stats.load_BE.sum(1)) if needs_window else None
            losses = auxiliary_losses(self.balancers, output.stats, window_ME)
        loss = output.loss
        for part in (*output.extra_losses.values(), *(aux.weighted for aux in losses.values())):
            loss = loss + part
        self.accumulator.add(output.loss, loss, output.extra_losses, losses, output.stats)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """On this thread: on one of autograd's, kernels launched from Python would wait for the interpreter's lock."""
        with torch.autograd.set_multithreading_enabled(False):
            super().backward(loss, *args, **kwargs)
        if self._is_first_micro_batch and self.trainer.accumulate_grad_batches > 1:
            self.model.own_gradients()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Then the gradients go; Lightning keeps them through the next forward pass, beside all its activations."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        self._read_report()
        last = self.last_step
        assert last is not None
        assert self.grad_norm is not None
        self._reports.send(
            self.step + 1, [last.n_asked, last.loss, last.ce, self._ce_limit, self.grad_norm], self._evidence
        )

    def _read_report(self) -> None:
        report = self._reports.read()
        if report is not None:
            step, (n_asked, loss, ce, ce_limit, norm), evidence = report
            self.must_stop |= n_asked > 0
            if not math.isfinite(loss + norm):
                self._leave_out(step, NonFiniteError, f"loss {loss:.4g}, gradient norm {norm:.4g}", evidence)
            elif ce > ce_limit:
                usual = f"more than trainer.max_loss_spike={self.config.trainer.max_loss_spike:g} times the usual"
                self._leave_out(step, LossSpikeError, f"cross-entropy {ce:.4g}, {usual}", evidence)
        if world_size() == 1:
            self.must_stop |= received(self.trainer) is not None

    def _ask_in_validation(self) -> None:
        """One batch late where there are other ranks, as `StepReports` are."""
        asked = received(self.trainer) is not None
        if world_size() == 1:
            self.must_stop |= asked
            return
        report = self._asked.read()
        self.must_stop |= report is not None and report[1][0] > 0
        n_asked = torch.full((), float(asked), device=self.device)
        self._asked.send(self.step, list(all_reduce_sums({"asked": n_asked}).values()))

    def _stop_if_asked(self) -> None:
        """After `StepCheckpoint` has saved."""
        if not self.must_stop or (self.is_last_step and not self._validation_due):
            return
        if self.trainer.is_global_zero:
            requeue(self.trainer)
        gather(None)  # what launched them ends all when one ends, so none does before the first has saved and asked
        raise Preempted(self.step, exit_code(self.trainer))

    def _leave_out(self, step: int, error: type[BadStepError], what: str, evidence: Evidence) -> None:
        """Say what was wrong with a step that the optimizer did not take. Raises `error` after too many, on all ranks,
        which must all call it."""
        self.n_skipped += 1
        most, model = self.config.trainer.max_skipped_steps, self.config.model
        first, last = (step - 1) * self.batch_samples, step * self.batch_samples - 1
        more = evidence.describe(self.model, [model.layer_name(layer) for layer in model.routed_layers])
        problem = f"step {step}: {what}; samples {first} to {last} of the order of samples" + (more and f"; {more}")
        if self.n_skipped > most:
            raise error(
                f"{problem}\n  remedy: look at those samples, lower optim.lr, or leave such steps out: "
                f"--resume auto trainer.max_skipped_steps={most + 10}"
            )
        if self.trainer.is_global_zero:
            print(f"{problem}; left out, {self.n_skipped} of at most {most}", file=sys.stderr, flush=True)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.last_step = self.accumulator.finish(received(self.trainer) is not None)
        self.lr = float(optimizer.param_groups[0]["lr"])
        if self.last_step.load_ME is not None:
            self.recent_load.add(self.last_step.load_ME, self.step)

    @torch.no_grad()
    def _update_expert_bias(self, load_ME: Tensor, takes_step: Tensor) -> None:
        bias_ME = self.expert_bias_ME
        if bias_ME is None:
            return
        new_ME = bias_ME
        for balancer in self.balancers:
            updated = balancer.update_bias(new_ME, load_ME, self.step)
            new_ME = new_ME if updated is None else torch.where(takes_step, updated, new_ME)
        self.bias_update_ME = new_ME - bias_ME
        for layer, new_E in zip(self.model.moe_layers, new_ME, strict=True):
            layer.router.expert_bias.copy_(new_E)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        assert self.last_step is not None
        step, factor = self.last_step, self.config.trainer.max_loss_spike
        loss, self._ce_limit = step.loss, torch.full_like(step.ce, torch.nan)
        if factor is not None:
            self._ce_limit = self._recent_losses.limit(step.ce, factor, self.step)
            loss = torch.where(step.ce > self._ce_limit, torch.nan, loss)  # so nothing takes the step
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norms = tensor_norms([parameter.grad for parameter in parameters if parameter.grad is not None])
        self._evidence = Evidence(step.own_loss, step.logit_max_M, parameters, norms)
        self.grad_norm = clip_gradients(optimizer, parameters, gradient_clip_val, loss, norms)
        if step.load_ME is not None:
            self._update_expert_bias(step.load_ME, is_finite(self.grad_norm, loss))

    @property
    def is_step_end(self) -> bool:
        """In `on_train_batch_end`: did this micro-batch complete an optimizer step?"""
        return self.step > self._step_before_batch

    @property
    def is_log_step(self) -> bool:
        """In `on_train_batch_end`: is this the moment at which scalars are logged and the device may be read?"""
        every, last = self.config.trainer.log_every_n_steps, self.config.trainer.max_steps
        return self.is_step_end and (self.step % every == 0 or self.step == last)

    @property
    def is_validation_step(self) -> bool:
        """Does a validation follow the optimizer step just done?"""
        due = self.step % self.config.data.val_every_n_steps == 0 or self.is_last_step
        return bool(self.trainer.enable_validation and due)

    @property
    def is_last_step(self) -> bool:
        return bool(self.step == self.config.trainer.max_steps or self.trainer.should_stop)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.is_step_end and self.is_last_step:
            self.trainer.should_stop = True  # which makes Lightning validate once more
        if self.is_log_step:
            assert self.last_step is not None
            assert self.grad_norm is not None
            step = self.last_step
            scalars: dict[str, Tensor | float] = {
                "train/ce": step.ce,
                "train/loss": step.loss,
                "train/grad_norm": self.grad_norm,
            }
            scalars |= {f"train/{name}": value for name, value in step.extra.items()}
            tokens = self.step * self.config.optim.batch_tokens
            if self.config.trainer.max_skipped_steps:
                self._read_report()  # the device is waited for anyway
                scalars["train/skipped_steps"] = self.n_skipped
            self.log_scalars(
                {**scalars, "train/lr": self.lr, "train/tokens": tokens, "train/flops": tokens * self.flops_per_token}
            )
        if self.is_step_end and not self.is_validation_step:
            self._stop_if_asked()

    def log_scalars(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Write scalars against the current step. Tensors come to the host together, in one transfer."""
        names = [name for name, value in scalars.items() if isinstance(value, Tensor)]
        values = {name: float(value) for name, value in scalars.items() if not isinstance(value, Tensor)}
        if names:
            stacked = torch.stack([torch.as_tensor(scalars[name]).double().reshape(()) for name in names])
            values |= dict(zip(names, stacked.tolist(), strict=True))
        self.latest |= values
        if self.logger is not None:
            self.logger.log_metrics(values, step=self.step)

    # -------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what is still queued is training, not validation
        self._validation_started = time.perf_counter()
        self._validation_due = not self.trainer.sanity_checking
        self._asked = StepReports()
        self.evaluation_sums = EvaluationSums(self.domains)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, GPTOutput]:
        """What the model returned, under "output", for callbacks (`on_validation_batch_end`)."""
        assert self.evaluation_sums is not None
        output = forward_batch(self.model, batch, self.document_separator)
        self.evaluation_sums.add(batch, output)
        if self._validation_due:
            self._ask_in_validation()
        return {"output": output}

    def on_validation_batch_end(self, *args: Any) -> None:
        if self._validation_due:
            self._stop_if_asked()

    def on_validation_epoch_end(self) -> None:
        self._validation_due = False
        assert self.evaluation_sums is not None
        self.evaluation = self.evaluation_sums.results()
        if not self.trainer.sanity_checking:
            scalars = self.evaluation["all"].scalars()
            self.log_scalars({f"val/{name}": value for name, value in scalars.items()})
            self.log("val/ce", scalars["ce"], logger=False)  # for EarlyStopping and its like
            self.paused_s += time.perf_counter() - self._validation_started

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._stop_if_asked()

    # -------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._read_report()
        names, weights = zip(*((n, p.detach()) for n, p in self.model.named_parameters()), strict=True)
        are_finite = torch.stack(tensor_norms(weights)).isfinite().tolist()
        bad = [name for name, fine in zip(names, are_finite, strict=True) if not fine]
        by_rank = gather((self._rng_to_restore or rng_state(), bad))
        for _, found in by_rank:
            if found:
                problem = f"{found[0]} holds what is no number, so the step is not saved"
                remedy = "continue from the checkpoint before with --resume auto and a lower optim.lr"
                raise NonFiniteError(f"step {self.step}: {problem}\n  remedy: {remedy}")
        checkpoint["moelm"] = {
            "step": self.step,
            "rng_by_rank": [state for state, _ in by_rank],
            "recent_load": self.recent_load.ring,
            "parameters": parameter_names(self.model, self.trainer.optimizers[0]),
            "validation_due": self._validation_due,
            "n_skipped": self.n_skipped,
            "recent_losses": self._recent_losses.ring,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["moelm"]
        states = state["rng_by_rank"]
        # another number of ranks: their streams cannot be continued, so the seeds of on_fit_start stand
        self._rng_to_restore = states[self.global_rank] if len(states) == self.trainer.world_size else None
        self.recent_load.ring = state["recent_load"]
        self._validation_due = state.get("validation_due", False)
        self.n_skipped = state.get("n_skipped", 0)
        self._recent_losses.ring = state.get("recent_losses")
        checkpoint["loops"] = {"fit_loop": self.trainer.fit_loop.state_dict()}  # what it says of them does not count
        set_loop_position(checkpoint["loops"]["fit_loop"], state["step"], self.trainer.accumulate_grad_batches)

    def load_summary(self) -> dict[str, float | None]:
        """`moe/max_violation` of the last batch (mean over layers) and the dead experts of the last steps."""
        load_ME = None if self.last_step is None else self.last_step.load_ME
        ring = self.recent_load.ring  # of a checkpoint where no step came after it
        return {
            "moe/max_violation": None if load_ME is None else float(max_violation(load_ME).mean()),
            "moe/dead_experts": None if ring is None else int(dead_experts(self.recent_load.total()).sum()),
        }


def set_loop_position(fit_loop: dict[str, Any], step: int, accumulation: int) -> None:
    """Rewrite Lightning's saved loop counters to "just after optimizer step `step`", inside one endless epoch.

    Lightning's own depend on the hook that saved (in the middle of a batch's bookkeeping, after a validation, at
    the end of fit), and count micro-batches, of which another device count makes another number.
    """
    done = dict.fromkeys(("ready", "started", "processed", "completed"), step * accumulation)
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["total"], batches["current"], batches["is_last_batch"] = dict(done), dict(done), False
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    fit_loop["epoch_progress"]["total"], fit_loop["epoch_progress"]["current"] = dict(epoch), dict(epoch)
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for key in ("step", "zero_grad"):
        for span in ("total", "current"):
            optimizer[key][span] |= dict.fromkeys(optimizer[key][span], step)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step

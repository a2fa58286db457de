"""What accumulation and ranks do to the gradient of each balancer's loss: nothing, or what docs/maths.md says.

The same 16 sequences go through the real trainer in four layouts; one optimizer step a balancer, on weights that a
vanishing learning rate keeps where they were. Run as a script, this file is `python -m moelm.train` with the callback
that writes the gradients down, so that each rank of a DDP run has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from moelm import command_line
from moelm.config import Config, NamedConfig, check, from_dict, register, to_yaml
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.types import RouterStats
from moelm.train import main, train
from moelm.training.evaluation import forward_batch

BALANCERS = ("sequence", "device", "communication", "z_loss", "global_batch", "switch", "importance")
LAYOUTS = {"one": (1, 16), "accumulated": (1, 4), "ranks": (2, 8), "both": (2, 4)}  # ranks, sequences a micro-batch
INVARIANT = 2e-6  # relative L2 distance of float32 gradients whose sums were taken in another order
COEF = 1000.0  # so large that the cross-entropy is a small part of the gradient, as a test asserts

# ------------------------------------------------------------------------- what runs beside the trainer, on each rank


def set_expert_bias(model: Any) -> None:
    """Other values in each layer, large enough to change choices."""
    for i, layer in enumerate(model.moe_layers):
        bias_E = layer.router.expert_bias
        bias_E.copy_(torch.linspace(0.2, -0.2, len(bias_E)).roll(3 * i))


@dataclass
class GradientRecorderConfig(NamedConfig):
    folder: str = ""


@register("callback", "gradient_recorder", GradientRecorderConfig)
class GradientRecorder(Callback):
    """At optimizer step i balancer i alone has a coefficient, at the step after the last one none. Each rank leaves
    `rank-R.pt`: by step, the router gradients as the optimizer gets them, and this rank's micro-batches."""

    def __init__(self, config: GradientRecorderConfig, run: Config) -> None:
        self.folder = Path(config.folder)
        self.gradients: list[Tensor] = []  # [M, E, D] of the routers, by step
        self.micro_batches: list[list[dict[str, Tensor]]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        set_expert_bias(pl_module.model)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for i, balancer in enumerate(pl_module.balancers):
            balancer.config.coef = COEF if i == pl_module.step else 0.0
        if pl_module.step == len(self.micro_batches):
            self.micro_batches.append([])
        self.micro_batches[-1].append({key: value.clone() for key, value in batch.items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.stack([layer.router.weight.grad for layer in pl_module.model.moe_layers]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        record = {"gradients": torch.stack(self.gradients), "micro_batches": self.micro_batches}
        torch.save(record, self.folder / f"rank-{trainer.global_rank}.pt")


# ------------------------------------------------------------------------------------------------------- the runs


class Run:
    """What the ranks of one layout recorded."""

    def __init__(self, folder: Path, n_ranks: int) -> None:
        by_rank = [torch.load(folder / f"rank-{rank}.pt") for rank in range(n_ranks)]
        self.gradients_of_ranks: list[Tensor] = [rank["gradients"] for rank in by_rank]  # by step [M, E, D]
        self.gradients = self.gradients_of_ranks[0]
        by_step = zip(*(rank["micro_batches"] for rank in by_rank), strict=True)
        self.batches = [list(zip(*ranks, strict=True)) for ranks in by_step]  # step, micro-batch, rank


@pytest.fixture(scope="module")
def config(corpus: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Config:
    raw = {
        "run": {"dir": str(tmp_path_factory.mktemp("runs")), "seed": 3},
        "model": {
            "n_layers": 2,
            "d_model": 32,
            "vocab_size": 512,
            "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
            "moe": {
                "n_experts": 8,
                "top_k": 2,
                "d_expert": 16,
                "router": {"name": "top_k", "n_groups": 4, "top_k_groups": 2, "selection_bias": True},
                "balancers": [*BALANCERS, {"name": "loss_free", "rate": 1e-30}],
            },
            "init": {"router_std": 0.2},  # uneven loads
        },
        "data": {"corpus": corpus, "seq_len": 32, "val_every_n_steps": 100},
        "optim": {"batch_tokens": 512, "lr": 1e-30},
        "trainer": {
            "max_steps": len(BALANCERS) + 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "limit_val_batches": 1,
        },
    }
    config = from_dict(Config, raw)
    check(config)
    return config


class Runs(dict[str, Run]):
    """By layout, each made when it is asked for: those of ranks are processes of their own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def __missing__(self, name: str) -> Run:
        config, (n_ranks, micro_batch_size) = self.config, LAYOUTS[name]
        folder = Path(config.run.dir) / f"gradients-{name}"
        config.run.name, config.optim.micro_batch_size = name, micro_batch_size
        config.callbacks = [GradientRecorderConfig("gradient_recorder", str(folder))]
        if n_ranks == 1:
            train(config)
        else:
            file = Path(config.run.dir) / f"{name}.yaml"
            file.write_text(to_yaml(config))
            command = [sys.executable, __file__, "--config", str(file)]
            command += ["trainer.strategy=ddp", f"trainer.devices={n_ranks}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
            assert result.returncode == 0, result.stderr[-3000:]
        self[name] = Run(folder, n_ranks)
        return self[name]


@pytest.fixture(scope="module")
def runs(config: Config) -> Runs:
    return Runs(config)


@pytest.fixture(scope="module")
def model(config: Config) -> GPT:
    """What all runs began with, and never left."""
    model = GPT(config.model)
    initialize(model, config.run.seed)
    set_expert_bias(model)
    return model


def distance(a_MED: Tensor, b_MED: Tensor) -> float:
    """The largest relative L2 distance of a layer."""
    return float(((a_MED - b_MED).flatten(1).norm(dim=1) / b_MED.flatten(1).norm(dim=1)).max())


# --------------------------------------------------------------- the losses once more, layer by layer, in float64


def product(counts: Tensor, probability: Tensor) -> Tensor:
    return len(counts) * (counts / counts.sum() * probability).sum()


def whole_mean(stats: RouterStats, layer: int) -> Tensor:
    return stats.prob_BE[layer].double().mean(0)  # all sequences are full


def reference(name: str, stats: RouterStats, layer: int, window_ME: Tensor) -> Tensor:
    """The loss of one layer on one micro-batch, as docs/maths.md has it."""
    load_BE, free_BE, sent_BG = (
        x[layer].double() for x in (stats.load_BE, stats.unbiased_load_BE, stats.extra["sent_BG"])
    )
    prob_BE = stats.prob_BE[layer].double()
    rows = range(len(prob_BE))
    if name == "sequence":
        return torch.stack([product(free_BE[b], prob_BE[b]) for b in rows]).mean()
    if name == "device":
        pairs = [(free_BE[b].view(4, 2).sum(1), prob_BE[b].view(4, 2).sum(1)) for b in rows]
        return torch.stack([product(*pair) for pair in pairs]).mean()
    if name == "communication":
        return torch.stack([product(sent_BG[b], prob_BE[b].view(4, 2).sum(1)) for b in rows]).mean()
    if name == "switch":
        return product(load_BE.sum(0), whole_mean(stats, layer))
    if name == "global_batch":
        return product(window_ME[layer].double(), whole_mean(stats, layer))
    if name == "importance":
        gate_E = stats.gate_BE[layer].double().sum(0)
        return (gate_E / gate_E.mean() - 1).square().mean()
    assert name == "z_loss"
    return stats.log_z_sq[layer].double()


def expected_gradients(model: GPT, name: str, micro_batches: list[tuple[dict[str, Tensor], ...]]) -> Tensor:
    """Of the mean, over micro-batches and ranks, of cross-entropy + COEF x the mean over layers of the loss."""
    weights = [layer.router.weight for layer in model.moe_layers]
    total_MED = torch.zeros(len(weights), *weights[0].shape, dtype=torch.float64)
    window_ME = torch.zeros(len(weights), weights[0].shape[0])
    n = len(micro_batches) * len(micro_batches[0])
    for ranks in micro_batches:
        outputs = [forward_batch(model, batch, None) for batch in ranks]
        for output in outputs:  # running: what was counted up to this micro-batch, by all ranks
            window_ME = window_ME + output.stats.load_BE.sum(1)
        for output in outputs:
            layers = [reference(name, output.stats, layer, window_ME) for layer in range(len(weights))]
            loss = output.loss.double() + COEF * torch.stack(layers).mean()
            total_MED += torch.stack(torch.autograd.grad(loss, weights)) / n
    return total_MED


# --------------------------------------------------------------------------------------------------- the tests


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_layouts_train_on_the_same_sequences_and_the_losses_dominate(runs: Runs, model: GPT) -> None:
    every = {name: runs[name] for name in LAYOUTS}
    for step in range(len(BALANCERS) + 1):
        samples = {
            name: sorted(i for ranks in run.batches[step] for batch in ranks for i in batch["sample_ids"].tolist())
            for name, run in every.items()
        }
        assert set(map(tuple, samples.values())) == {tuple(range(16 * step, 16 * step + 16))}
    shapes = {name: (len(run.batches[0]), len(run.batches[0][0])) for name, run in every.items()}
    assert shapes == {"one": (1, 1), "accumulated": (4, 1), "ranks": (1, 2), "both": (2, 2)}
    for run in every.values():
        assert all(torch.equal(run.gradients, other) for other in run.gradients_of_ranks)
        norms = run.gradients.flatten(2).norm(dim=2)  # by step and layer
        assert (norms[:-1] > 30 * norms[-1]).all()
    stats = forward_batch(model, runs["one"].batches[0][0][0], None).stats
    assert (stats.load_BE != stats.unbiased_load_BE).any()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "layout", ["one", "accumulated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ranks", "both"))]
)
@pytest.mark.parametrize("name", BALANCERS)
def test_gradients_are_those_of_an_independent_implementation(runs: Runs, model: GPT, name: str, layout: str) -> None:
    step = BALANCERS.index(name)
    run = runs[layout]
    assert distance(run.gradients[step], expected_gradients(model, name, run.batches[step])) <= INVARIANT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequence", "device", "communication", "z_loss"])
def test_losses_that_are_means_over_sequences_or_tokens_do_not_change_with_the_layout(runs: Runs, name: str) -> None:
    step = BALANCERS.index(name)
    for layout in ("accumulated", "ranks", "both"):
        assert distance(runs[layout].gradients[step], runs["one"].gradients[step]) <= INVARIANT, layout


@pytest.mark.slow
def test_global_batch_does_not_change_with_ranks_and_has_running_counts_under_accumulation(
    runs: Runs,
) -> None:
    step = BALANCERS.index("global_batch")
    one = runs["one"].gradients[step]
    assert distance(runs["ranks"].gradients[step], one) <= INVARIANT
    assert 1e-3 < distance(runs["both"].gradients[step], one) < 0.3
    assert 1e-3 < distance(runs["accumulated"].gradients[step], one) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["switch", "importance"])
def test_losses_of_a_micro_batch_change_with_its_size_alone(runs: Runs, name: str) -> None:
    step = BALANCERS.index(name)
    one, ranks = runs["one"].gradients[step], runs["ranks"].gradients[step]
    assert distance(ranks, one) > 1e-3
    assert distance(runs["accumulated"].gradients[step], one) > 1e-3
    assert distance(runs["both"].gradients[step], runs["accumulated"].gradients[step]) <= INVARIANT


if __name__ == "__main__":
    command_line.run(main)

"""However a run is spread over devices, it is the run of one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from moelm.config import UserError
from moelm.verify.lab import Broken, Lab, Row, Run
from moelm.verify.same import distance

# with this eps the second moment counts for nothing: plain SGD with a learning rate of 0.3
SGD = ("optim.optimizer=adamw", "optim.betas=[0.0, 0.95]", "optim.eps=1e4", "optim.lr=3e3", "optim.weight_decay=0")
STEPS = ("trainer.max_steps=5", "model.dropout=0", "optim.schedule={name: constant}", "optim.moments=float32", *SGD)
FSDP = ("trainer.strategy=fsdp",)
SPREADS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DDP": (2, ()),
    "FSDP2": (2, FSDP),
    "experts shared by 2": (2, (*FSDP, "trainer.expert_parallel=2")),
    "experts shared by 2, static exchange": (2, (*FSDP, "trainer.expert_parallel=2", "trainer.static_exchange=true")),
    "FSDP2 2 x experts 2": (4, (*FSDP, "trainer.expert_parallel=2")),
    "experts shared by 4": (4, (*FSDP, "trainer.expert_parallel=4")),
    "2 replicas x FSDP2 2": (4, (*FSDP, "trainer.replicas=2")),
}
NOISY = ("noisy_top_k", "gshard", "reinforce", "random")
# largest differences: loss, gradient norm (relative), gradients of step 1 and later (relative L2), weights
FLOAT32, BF16 = (1e-6, 1e-6, 2e-6, 1e-5, 1e-5), (1e-3, 1e-2, 0.1, 0.3, 5e-3)


def rows(lab: Lab, full: bool) -> Iterator[Row]:
    moe = lab.config.model.moe
    if moe is not None and moe.router.name in NOISY:
        raise UserError(f"model.moe.router: {moe.router.name} draws numbers on each rank\n  remedy: router=top_k")
    quiet = [] if not hasattr(moe and moe.router, "jitter") else ["model.moe.router.jitter=0"]
    for name, (ranks, overrides) in SPREADS.items():
        can_be = lab.batch_samples % ranks == 0 and (moe or "experts" not in name)
        if can_be and (ranks in lab.devices or (full and ranks == 4 and lab.most >= 4)):
            yield Row(f"1 = {ranks} x {name}", partial(spread, lab, ranks, *quiet, *overrides))


def spread(lab: Lab, ranks: int, *overrides: str) -> str:
    quiet = [each for each in overrides if each.endswith("jitter=0")]
    one = lab.straight(*STEPS, *quiet, ranks=1, witnesses=["verify_gradients"])
    run = lab.start(f"spread-{len(lab.runs)}", *STEPS, *overrides, ranks=ranks, witnesses=["verify_gradients"])
    run.must_end_with(0)
    bounds = FLOAT32 if lab.config.trainer.precision == "32-true" else BF16
    worst = dict.fromkeys(("loss", "norm", "gradients", "weights"), 0.0)
    for rank in range(ranks):
        for i, (a, b) in enumerate(zip(steps_of(one, 0), steps_of(run, rank), strict=True)):
            where = f"step {i + 1}, rank {rank}"
            limits = dict(zip(worst, (bounds[0], bounds[1], bounds[2 if i == 0 else 3], bounds[4]), strict=True))
            found = {"loss": abs(a["loss"] - b["loss"]), "norm": abs(a["norm"] / b["norm"] - 1)}
            found |= {key: distance(a[key], b[key], f"{where}: {key}", limits[key]) for key in ("gradients", "weights")}
            for key, value in found.items():
                if not value <= limits[key]:
                    raise Broken(f"{where}: {key} differs by {value:.1e}")
                worst[key] = max(worst[key], value)
            if bounds is FLOAT32:
                distance([a["load"], a["bias"]], [b["load"], b["bias"]], f"{where}: load and bias")
    return "5 steps, at most " + ", ".join(f"{key} {value:.0e}" for key, value in worst.items())


def steps_of(run: Run, rank: int) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = torch.load(run.folder / f"gradients-{rank}.pt", weights_only=True)
    return steps

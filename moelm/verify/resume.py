"""A resumed run is the same run, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from moelm.verify.lab import Lab, Row
from moelm.verify.same import same_run

VARIANTS = {  # the first two for `all`
    "accumulation, a worker": ("data.n_workers=1",),
    "saves beside training": ("checkpoint.asynchronous=true",),
    "recomputation": ("trainer.activation_checkpointing=full",),
    "one micro-batch": ("optim.micro_batch_size=8",),
    "learned noise": ("model.moe.router=noisy_top_k", "model.moe.balancers=[importance, load]"),
}
SHARDED = ("trainer.strategy=fsdp", "checkpoint.asynchronous=true")
VALIDATION = 7  # steps between two


def rows(lab: Lab, full: bool) -> Iterator[Row]:
    variants = dict(list(VARIANTS.items())[: None if full else 2]) if lab.is_tiny else {"the config": ()}
    for ranks in lab.devices:
        for name, overrides in variants.items():
            yield Row(f"{ranks} x {name}", partial(resumed, lab, ranks, *overrides))
        if ranks > 1 and full:
            yield Row(f"{ranks} x fsdp in parts", partial(resumed, lab, ranks, *SHARDED))


def resumed(lab: Lab, ranks: int, *overrides: str) -> str:
    """Killed two steps after a save in the middle of an epoch, one at its end (where that comes soon) and one beside a
    validation; continued each time."""
    epoch = -(-lab.shards.n_windows("train", lab.config.data.seq_len) // lab.batch_samples)
    points = [5, epoch] if 5 < epoch < 50 else [5]
    points.append((points[-1] // VALIDATION + 1) * VALIDATION)
    last = points[-1] + 4
    steps = [f"data.val_every_n_steps={VALIDATION}", f"trainer.max_steps={last}"]
    straight = lab.straight(*overrides, *steps, f"checkpoint.every_n_steps={last}", ranks=ranks)
    name = f"resumed-{len(lab.runs)}"
    for i, point in enumerate(points):
        kill = {"name": "verify_mishap", "what": "SIGKILL", "step": point + 2, "ranks": list(range(ranks))}
        every = f"checkpoint.every_n_steps={point}"
        lab.start(name, *overrides, *steps, every, ranks=ranks, resume=i > 0, witnesses=[kill]).must_end_with(-9)
    end = lab.start(name, *overrides, *steps, ranks=ranks, resume=True)
    end.must_end_with(0)
    return same_run(straight, end, lab.bound)

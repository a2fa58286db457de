"""When two runs are the same run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from moelm.training.checkpoint_io import load_training, load_weights, step_folder
from moelm.verify.lab import Broken, Run


def same_run(straight: Run, other: Run, bound: float = 0.0) -> str:
    """Batches and losses of every rank and step, those that were made twice too; the last checkpoint; the curves.
    Returns what was found, in words; raises Broken."""
    last = straight.config.trainer.max_steps
    ranks = len(straight.processes)
    legs = {line["pid"] for line in other.lines("tape")}
    worst = 0.0
    for rank in range(ranks):
        expected = {line["step"]: line for line in straight.lines("tape", rank)}
        found = {line["step"] for line in other.lines("tape", rank)}
        if found != expected.keys():
            raise Broken(f"rank {rank} made the steps {sorted(found)}, not 1 to {last}")
        for line in other.lines("tape", rank):
            step = line["step"]
            if line["batches"] != expected[step]["batches"]:
                raise Broken(f"step {step}: rank {rank} got other batches")
            losses = [torch.tensor([float.fromhex(x) for x in each["losses"]]) for each in (expected[step], line)]
            worst = max(worst, distance(losses[0], losses[1], f"step {step}: losses of rank {rank}", bound))
    states = [state_of(step_folder(run.folder, last)) for run in (straight, other)]
    worst = max(worst, distance(states[0], states[1], f"checkpoint {last}", bound))
    curves = [curves_of(run.folder) for run in (straight, other)]
    worst = max(worst, distance(curves[0], curves[1], "TensorBoard", bound))
    n_tensors = sum(isinstance(value, Tensor) for value in flat(states[0]))
    alike = "equal to the bit" if worst == 0 else f"within {worst:.0e}"
    return f"{last} steps in {len(legs)} processes a rank, {n_tensors} tensors, {len(curves[0])} curves: {alike}"


def state_of(folder: Path) -> dict[str, Any]:
    """Of a checkpoint all but Lightning's bookkeeping and the run's name."""
    training = load_training(folder)
    own = {key: training["moelm"][key] for key in ("rng_by_rank", "recent_load", "step")}
    kept = {key: training[key] for key in ("optimizer_states", "lr_schedulers", "global_step")}
    return {"weights": dict(load_weights(folder)), **kept, **own}


def curves_of(folder: Path) -> dict[str, Any]:
    """Tag -> steps and values, but for those of speed. Raises Broken for a curve that repeats a step or runs back."""
    logging.getLogger("tensorboard").setLevel(
        logging.ERROR
    )  # what a run made after its last save is hidden, as it says
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        if steps != sorted(set(steps)):
            raise Broken(f"TensorBoard: {tag} has the steps {steps}")
        if not tag.startswith("perf/"):
            curves[tag] = {"steps": steps, "values": torch.tensor([event.value for event in events.Scalars(tag)])}
    return curves


def distance(a: Any, b: Any, where: str, bound: float = 0.0) -> float:
    """The largest relative L2 distance of two float tensors in nested containers. Raises Broken where it is more than
    `bound`, or where anything else is not equal."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((distance(a[key], b[key], f"{where}, {key}", bound) for key in a), default=0.0)
    if isinstance(a, list | tuple) and len(a) == len(b):
        return max(
            (distance(x, y, f"{where}, {i}", bound) for i, (x, y) in enumerate(zip(a, b, strict=True))), default=0.0
        )
    if not isinstance(a, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        if isinstance(a, Tensor) or a != b:
            raise Broken(f"{where}: {shown(a)} became {shown(b)}")
        return 0.0
    if torch.equal(a, b):
        return 0.0
    difference = float((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30))
    if not difference <= bound or not a.is_floating_point():
        raise Broken(f"{where}: differs by {difference:.1e} in relative L2")
    return difference


def shown(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def flat(values: Any) -> list[Any]:
    if isinstance(values, dict | list | tuple):
        return [leaf for value in (values.values() if isinstance(values, dict) else values) for leaf in flat(value)]
    return [values]

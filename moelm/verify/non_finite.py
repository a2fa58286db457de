"""A step that is not finite changes nothing, and an error of one rank ends all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from moelm.training.checkpoint_io import step_folder
from moelm.verify.lab import Broken, Lab, Row, Run
from moelm.verify.preempt import LIMIT_S
from moelm.verify.same import distance, flat, state_of

STEPS = ("trainer.max_steps=6", "checkpoint.every_n_steps=1", "checkpoint.keep_last=9")
STEP = 3


def rows(lab: Lab, full: bool) -> Iterator[Row]:
    for ranks in lab.devices:
        strategies = {"": ()} if ranks == 1 else {" ddp": (), **({" fsdp": ("trainer.strategy=fsdp",)} if full else {})}
        for name, overrides in strategies.items():
            yield Row(f"{ranks} x{name} NaN: stop", partial(stopped, lab, ranks, *overrides))
            yield Row(f"{ranks} x{name} NaN: leave the step out", partial(left_out, lab, ranks, *overrides))
    ranks = lab.devices[-1]
    yield Row(f"{ranks} x exception on one rank", partial(failed, lab, ranks))


def mishap(what: str, ranks: int) -> dict[str, Any]:
    return {"name": "verify_mishap", "what": what, "step": STEP, "ranks": [ranks - 1]}


def stopped(lab: Lab, ranks: int, *overrides: str) -> str:
    run = lab.start(f"nan-{len(lab.runs)}", *STEPS, *overrides, ranks=ranks, witnesses=[mishap("nan", ranks)])
    codes = run.wait(grace_s=LIMIT_S)
    took = run.since_mishap()
    if took > LIMIT_S or any(code in (0, 75) for code in codes):
        raise Broken(f"ended with {codes} after {took:.1f} s{run.last_words}")
    if f"step {STEP}" not in run.log.read_text():
        raise Broken(f"it does not name step {STEP}{run.last_words}")
    check_finite(run, run.newest_step)
    if run.newest_step != STEP - 1:
        raise Broken(f"the newest whole checkpoint is {run.newest_step}")
    return f"all ended with {codes[0]} after {took:.1f} s; step {run.newest_step}, finite, is the newest"


def check_finite(run: Run, step: int) -> None:
    values = flat(state_of(step_folder(run.folder, step)))
    if not all(value.isfinite().all() for value in values if isinstance(value, Tensor) and value.is_floating_point()):
        raise Broken(f"checkpoint {step} is not finite")


def left_out(lab: Lab, ranks: int, *overrides: str) -> str:
    steps = (*STEPS, "trainer.max_skipped_steps=1", *overrides)
    run = lab.start(f"skip-{len(lab.runs)}", *steps, ranks=ranks, witnesses=[mishap("nan", ranks)])
    run.must_end_with(0)
    before, after, later = (state_of(step_folder(run.folder, STEP + i)) for i in (-1, 0, 1))
    unchanged = [[each["weights"], moments(each)] for each in (before, after)]
    distance(unchanged[0], unchanged[1], f"step {STEP} was left out, yet of weights and moments")
    if all(later["weights"][name].equal(weight) for name, weight in after["weights"].items()):
        raise Broken(f"step {STEP + 1} changed nothing either")
    check_finite(run, 6)
    return f"{len(flat(unchanged[0]))} tensors unchanged by step {STEP}; finite at the end"


def moments(state: dict[str, Any]) -> Any:
    """Without the learning rate, which goes on."""
    return [each["state"] for each in state["optimizer_states"]]


def failed(lab: Lab, ranks: int) -> str:
    name = f"failed-{len(lab.runs)}"
    run = lab.start(name, *STEPS, ranks=ranks, witnesses=[mishap("error", ranks)], as_command=True)
    codes = run.wait()
    took = run.since_mishap()
    log = run.log.read_text()
    if took > LIMIT_S or codes[0] in (0, 75):
        raise Broken(f"ended with {codes[0]} after {took:.1f} s{run.last_words}")
    if "Traceback" not in log or f"planted on rank {ranks - 1}" not in log:
        raise Broken(f"its traceback is not on the console{run.last_words}")
    return f"ended with {codes[0]} after {took:.1f} s, its traceback on the console"

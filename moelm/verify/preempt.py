"""A run that is told to end saves the step that it is in, ends in time, and continues as if not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from moelm.training.preemption import EXIT_CODE
from moelm.verify.lab import Broken, Lab, Row
from moelm.verify.same import same_run

LIMIT_S = 10.0
MOMENTS = {"forward": 4, "validation": 5, "save": 6}  # the step at which the signal comes
STEPS = (
    *("trainer.max_steps=11", "data.val_every_n_steps=5", "checkpoint.every_n_steps=6"),
    "data.n_workers=1",
)


def rows(lab: Lab, full: bool) -> Iterator[Row]:
    for ranks in lab.devices:
        everyone = tuple(range(ranks))
        told = [("SIGTERM", everyone), ("SIGINT", everyone), ("SIGUSR1", everyone[:1])]  # a terminal tells everyone
        told += [("SIGTERM", everyone[-1:])] if ranks > 1 else []
        cases = list(product(told, MOMENTS)) if full else list(zip(told, (*MOMENTS, "forward"), strict=False))
        for (signal, to), moment in cases:
            yield row(lab, ranks, signal, to, moment)
        if ranks > 1:
            for to in (everyone[-1:], everyone[:1], everyone) if full else (everyone[-1:],):
                yield row(lab, ranks, "SIGTERM", to, "forward", as_command=True)


def row(lab: Lab, ranks: int, signal: str, to: tuple[int, ...], moment: str, as_command: bool = False) -> Row:
    whom = "all" if len(to) == ranks else f"rank {to[0]}"
    name = f"{ranks} x {signal} to {whom}" + (", by Lightning" if as_command else f" in {moment}")
    mishap = {"name": "verify_mishap", "what": signal, "when": moment, "step": MOMENTS[moment], "ranks": list(to)}
    return Row(name, partial(preempted, lab, ranks, mishap, as_command))


def preempted(lab: Lab, ranks: int, mishap: dict[str, object], as_command: bool) -> str:
    straight = lab.straight(*STEPS, ranks=ranks)
    name = f"preempted-{len(lab.runs)}"
    run = lab.start(name, *STEPS, ranks=ranks, witnesses=[mishap], as_command=as_command)
    run.must_end_with(EXIT_CODE)
    took = run.since_mishap()
    done = run.lines("tape")[-1]["step"]
    if run.newest_step != done:
        raise Broken(f"step {done} was made, and the newest whole checkpoint is {run.newest_step}")
    if f"step {done} is saved" not in run.log.read_text():
        raise Broken(f"it does not say that step {done} is saved{run.last_words}")
    if took > (LIMIT_S if lab.is_tiny else run.config.trainer.stop_within_s) or done > MOMENTS[str(mishap["when"])] + 2:
        raise Broken(f"ended {took:.1f} s later, after step {done}")
    end = lab.start(name, *STEPS, ranks=ranks, resume=True)
    end.must_end_with(0)
    same_run(straight, end, lab.bound)
    return f"exit code {EXIT_CODE} after {took:.1f} s, step {done} saved, continued equal"

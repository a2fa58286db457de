"""A SIGKILL at any moment, in a save too, costs at most what was made since the last one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moelm.training.checkpoint_io import is_valid, step_folders
from moelm.verify.lab import LIMIT_S, Broken, Lab, Row, Run
from moelm.verify.same import curves_of

NEVER = 10**6
SAVES = {
    "in place": (),
    "beside training": ("checkpoint.asynchronous=true",),
    "in parts": ("trainer.strategy=fsdp",),
}


def rows(lab: Lab, full: bool) -> Iterator[Row]:
    n = lab.n or (25 if full else 5)
    for asynchronous in (False, True):
        name = "saved beside training" if asynchronous else "saved in place"
        yield Row(f"{n} kills, {name}", partial(kills, lab, asynchronous, n))
    for ranks in lab.devices if full else (1,):
        for name, overrides in list(SAVES.items())[: 2 + (ranks > 1)]:
            yield Row(f"{ranks} x {name}, all synced", partial(synced, lab, ranks, *overrides))


def soak(lab: Lab, minutes: float) -> Iterator[Row]:
    yield Row(f"{minutes:g} minutes, a kill every 60 to 90 s", partial(soaked, lab, minutes))


def kills(lab: Lab, asynchronous: bool, n: int) -> str:
    trial = Trial(lab, asynchronous, every=1)
    for i in range(n):
        trial.once(trial.random.uniform(0, 1), aimed=i % 2 == 1)
    unsaved = f"checkpoint.every_n_steps={NEVER}"
    return trial.compared(lab.start(f"{trial.name}-straight", *trial.overrides, unsaved))


def soaked(lab: Lab, minutes: float) -> str:
    trial = Trial(lab, asynchronous=True, every=20)
    straight = lab.start(f"{trial.name}-straight", *trial.overrides)
    until, memory = time.monotonic() + 60 * minutes, list[int]()
    while time.monotonic() < until:
        trial.once(trial.random.uniform(60, 90), aimed=len(memory) % 2 == 1)
        memory.append(resident_bytes(straight))
    growth = memory[-1] / memory[len(memory) // 10] - 1  # not from the very start
    if growth > 0.05:
        raise Broken(f"memory grew by {growth:.0%} to {memory[-1] / 2**20:.0f} MiB")
    return f"{trial.compared(straight)}; memory {memory[-1] / 2**20:.0f} MiB, {growth:+.1%}"


class Trial:
    """A run that is killed and continued again and again."""

    def __init__(self, lab: Lab, asynchronous: bool, every: int) -> None:
        self.lab, self.every, self.random = lab, every, random.Random(7)
        self.most_lost = (1 + asynchronous) * every  # such a save is settled before the next one begins
        self.overrides = [f"checkpoint.every_n_steps={every}", f"checkpoint.asynchronous={asynchronous}"]
        self.overrides += [f"trainer.max_steps={NEVER}", f"data.val_every_n_steps={50 * every}"]
        self.name = f"killed-{len(lab.runs)}"
        self.newest = 0  # whole checkpoint
        self.lost: list[int] = []  # steps, by kill
        self.in_a_save = 0

    def once(self, after_s: float, aimed: bool) -> None:
        """Start or continue, kill `after_s` later, or if `aimed` a moment after the next stage of a save is there."""
        before = self.newest
        run = self.lab.start(self.name, *self.overrides, resume=bool(self.lost))
        self._check_start(run)
        time.sleep(after_s)
        until = time.monotonic() + 5
        while aimed and not stages(run.folder) and time.monotonic() < until:
            time.sleep(1e-4)
        time.sleep(self.random.uniform(0, 0.01) if aimed else 0)
        if None not in run.codes:
            raise Broken(f"it ended by itself, with {run.codes}{run.last_words}")
        run.kill()
        self.in_a_save += bool(stages(run.folder))
        torn = [folder.name for folder in step_folders(run.folder) if not is_valid(folder)]
        if torn:
            raise Broken(f"{', '.join(torn)} is in place and not whole")
        done = run.lines("tape")[-1]["step"]
        self.newest = run.newest_step
        self.lost.append(done - self.newest)
        if self.lost[-1] > self.most_lost or self.newest < before:
            raise Broken(f"killed after step {done}, and the newest whole checkpoint is {self.newest}")

    def _check_start(self, run: Run) -> None:
        """When it has made a step: was it the right one, and is nothing of before left?"""
        saved, pid, until = self.newest, run.processes[0].pid, time.monotonic() + LIMIT_S
        while not (own := [line["step"] for line in run.lines("tape") if line["pid"] == pid]):
            if None not in run.codes:
                raise Broken(f"it did not start again, but ended with {run.codes}{run.last_words}")
            if time.monotonic() > until:
                run.kill()
                raise Broken(f"no step {LIMIT_S:.0f} s after it was continued{run.last_words}")
            time.sleep(0.002)
        if self.lost and own[0] != saved + 1:
            raise Broken(f"continued with step {own[0]}, and the newest whole checkpoint was {saved}")
        of_itself = f"-{pid}", f"-{pid}-old"  # what it is writing, and deleting, since then
        strays = [path.name for path in run.folder.glob(".*") if not path.name.endswith(of_itself)]
        strays += [path.name for path in (self.lab.other_disk or Path("/nowhere")).glob("*")]
        if strays:
            raise Broken(f"left over: {', '.join(strays)}")

    def compared(self, straight: Run) -> str:
        """What the killed run computed, each time that it made a step, is what `straight` did."""
        end = self.lab.start(self.name, *self.overrides, resume=True)
        self._check_start(end)
        end.kill()
        curves_of(end.folder)  # none repeats a step or runs back
        lines = end.lines("tape")
        last, seen, until = max(line["step"] for line in lines), 0, time.monotonic() + LIMIT_S
        while not (made := straight.lines("tape")) or made[-1]["step"] < last:
            if None not in straight.codes:
                raise Broken(f"the run beside it ended with {straight.codes}{straight.last_words}")
            if len(made) > seen:
                seen, until = len(made), time.monotonic() + LIMIT_S
            if time.monotonic() > until:
                raise Broken(f"the run beside it made no step in {LIMIT_S:.0f} s{straight.last_words}")
            time.sleep(0.2)
        straight.kill()
        expected = {line["step"]: (line["batches"], line["losses"]) for line in made}
        wrong = [line["step"] for line in lines if expected[line["step"]] != (line["batches"], line["losses"])]
        if wrong and not self.lab.on_cuda:
            raise Broken(f"step {wrong[0]} was another one than in a run that was not killed")
        return (
            f"{len(self.lost)} of {len(self.lost)} continued, {self.in_a_save} killed in a save; at most "
            f"{max(self.lost)} steps lost (interval {self.every}); 0 torn, 0 left over; {last} steps equal"
        )


def stages(folder: Path) -> list[Path]:
    return list(folder.glob(".step-*.tmp-*"))


def resident_bytes(run: Run) -> int:
    """1 where the system has no /proc."""
    file = Path(f"/proc/{run.processes[0].pid}/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 1


def synced(lab: Lab, ranks: int, *overrides: str) -> str:
    """A power cut is not tried: every file must be synced before its name, and then the name."""
    steps = ("trainer.max_steps=3", "checkpoint.every_n_steps=1", *overrides)
    run = lab.start(f"synced-{len(lab.runs)}", *steps, ranks=ranks, witnesses=["verify_syncs"])
    run.must_end_with(0)
    events = sorted((line for rank in range(ranks) for line in run.lines("syncs", rank)), key=lambda line: line["at"])
    published = [i for i, event in enumerate(events) if "checkpoint" in event]
    if len(published) != 3:
        raise Broken(f"{len(published)} of 3 checkpoints were renamed into place")
    for start, at, end in zip([0, *published], published, [*published[1:], len(events)], strict=False):
        event = events[at]
        before, after = ([each.get("synced") for each in events[a:b]] for a, b in ((start, at), (at, end)))
        missing = [name for name, file in event["files"].items() if file not in before]
        missing += [] if event["folder"] in after else ["its name"]
        if missing:
            raise Broken(f"{event['checkpoint']}: not synced: {', '.join(missing)}")
    return f"3 checkpoints of {len(event['files']) - 1} files"

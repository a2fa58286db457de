"""python -m moelm.verify [WHAT ...] [--config F] [key=value ...]: does this machine keep what moelm promises?"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator

from moelm import command_line
from moelm.config import UserError
from moelm.verify import counters, kill, non_finite, preempt, resume, strategies
from moelm.verify.lab import Broken, Lab, Row

SUBJECTS: dict[str, Callable[[Lab, bool], Iterator[Row]]] = {
    "resume": resume.rows,
    "kill": kill.rows,
    "preempt": preempt.rows,
    "nan": non_finite.rows,
    "counters": counters.rows,
    "strategies": strategies.rows,
}
EPILOG = """what:
  resume      an interrupted run equals the uninterrupted one, to the bit on a CPU
  kill        a SIGKILL at any moment costs at most one interval; no torn checkpoint, nothing left over
  preempt     SIGTERM, SIGINT and SIGUSR1: saved, ended in time, continued equal
  nan         a step that is not finite changes nothing; an exception of one rank ends all
  counters    experts' load and bias, tokens, FLOPs and steps equal a count by hand; balancing losses arrive
  strategies  one process = DDP = FSDP2 = shared experts
  all         a part of each, some minutes on two cores (the default); one by name is the whole matrix
  soak        not in all: --minutes of training with a kill every 60 to 90 s beside a run without

example:
  python -m moelm.verify
  python -m moelm.verify kill --n 50 run.dir=/mnt/shared/runs
  python -m moelm.verify resume preempt --config configs/quickstart.yaml --devices 1
"""


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.verify",
        "Try what moelm promises of a run by real runs on this machine, in run.dir; 1 is the exit code if anything "
        "fails. Without --config a tiny model on the CPU; with it that config, for some steps.",
        EPILOG,
    )
    parser.add_argument("words", nargs="*", metavar="WHAT | key=value", help="subjects, and changes of the config")
    parser.add_argument(
        "--config",
        metavar="F",
        help="a YAML file of your own; changed are only its number of steps, and micro-batches for several devices",
    )
    parser.add_argument("--devices", type=numbers, default=[], metavar="N[,N]", help="devices of a run: 1,2")
    parser.add_argument("--n", type=int, metavar="N", help="kills of each kind (all: 5, kill: 25)")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="of soak")
    arguments = command_line.parse(parser, argv)
    overrides = [word for word in arguments.words if "=" in word]
    named = [word for word in arguments.words if "=" not in word] or ["all"]
    for word in named:
        if word not in (*SUBJECTS, "all", "soak"):
            raise UserError(f"{word}: no subject\n  remedy: {', '.join(SUBJECTS)}, all or soak")
    if (arguments.n is not None and arguments.n < 1) or arguments.minutes <= 0:
        raise UserError("--n and --minutes: must be more than 0")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's job in the background; the runs would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    lab = Lab(arguments.config, overrides, arguments.devices, arguments.n or 0, arguments.plugin)
    n_failed = 0
    try:
        n_failed = verify(lab, named, arguments.minutes)
    finally:
        lab.close(keep=n_failed > 0)
    if n_failed:
        print(f"the runs are in {lab.folder}", file=sys.stderr)
        sys.exit(1)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def verify(lab: Lab, named: list[str], minutes: float) -> int:
    """Prints a row for each promise; returns how many are not kept."""
    verdicts, started = [], time.monotonic()
    for subject, rows in SUBJECTS.items():
        if subject in named or "all" in named:
            verdicts += [tell(subject, row) for row in rows(lab, subject in named)]
    if "soak" in named:
        verdicts += [tell("soak", row) for row in kill.soak(lab, minutes)]
    print(f"{sum(verdicts)} of {len(verdicts)} promises kept, {time.monotonic() - started:.0f} s", flush=True)
    return verdicts.count(False)


def tell(subject: str, row: Row) -> bool:
    is_watched = sys.stderr.isatty()
    if is_watched:
        print(f"  ...   {subject:<10}  {row.name}", end="\r", file=sys.stderr, flush=True)
    verdict = "FAIL"
    try:
        figures = row.check()
        verdict = "PASS"
    except Broken as broken:
        figures = str(broken)
    except Exception as error:  # a check that cannot be made is no promise kept
        figures = f"{type(error).__name__}: {error}"
    print(f"{verdict}  {subject:<10}  {row.name:<37}  {figures}", flush=True)
    return verdict == "PASS"


if __name__ == "__main__":
    command_line.run(main)

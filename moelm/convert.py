"""python -m moelm.convert from-hf|to-hf|join: a model of transformers becomes a checkpoint, or a checkpoint a model, or
what several ranks wrote one piece."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moelm import command_line
from moelm.config import UserError
from moelm.hub.exporting import Export
from moelm.hub.importing import Import
from moelm.hub.joining import Join, verify_join
from moelm.hub.streaming import DTYPES, Written, staged
from moelm.hub.verification import verify_export, verify_import

EPILOG = """example:
  python -m moelm.convert to-hf --checkpoint checkpoints/mixtral --out exported/mixtral
  python -m moelm.convert from-hf --model exported/mixtral --out checkpoints/imported --dtype bfloat16
  python -m moelm.convert join --checkpoint checkpoints/sharded --out checkpoints/whole

The source of from-hf is a folder with config.json and safetensors (files that can run code are not opened), that of
to-hf and join a run or one of its step-XXXXXXXX. join makes of what several ranks wrote what one device writes, a file
of weights and one of moments; nothing in moelm needs that. One layer is in memory at a time, of join one tensor. What
was written is compared with its source, bit by bit, in a process of its own; unless every tensor is there and right,
--out is not.
"""

SOURCES = {"from-hf": "model", "to-hf": "checkpoint", "join": "checkpoint"}


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.convert",
        "Convert a model from the format of transformers (Hugging Face) to a moelm checkpoint, or back, or join the "
        "files of a checkpoint.",
        EPILOG,
    )
    parser.add_argument("direction", choices=tuple(SOURCES))
    parser.add_argument("--model", metavar="DIR", type=Path, help="from-hf: the folder to convert")
    parser.add_argument("--checkpoint", metavar="RUN_OR_STEP", type=Path, help="to-hf, join: the checkpoint")
    result = parser.add_mutually_exclusive_group(required=True)
    result.add_argument("--out", metavar="DIR", type=Path, help="the folder to make; must not exist")
    result.add_argument("--verify", metavar="DIR", type=Path, help="only compare what an earlier conversion made")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights written; auto: as stored")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = command_line.parse(parser, argv)
    wanted = SOURCES[arguments.direction]
    other = "model" if wanted == "checkpoint" else "checkpoint"
    if getattr(arguments, wanted) is None or getattr(arguments, other) is not None:
        parser.error(f"{arguments.direction} takes --{wanted}, not --{other}")
    if arguments.direction == "join" and arguments.dtype != "auto":
        parser.error("join changes no --dtype")
    if arguments.verify is not None:
        n_tensors = verify(source_of(arguments), arguments.verify)
        print(json.dumps({"tensors": n_tensors}) if arguments.json else f"{n_tensors:,} tensors are right")
        return
    report = convert(arguments)
    print(json.dumps(report, indent=1) if arguments.json else as_text(report, arguments.out))


def source_of(arguments: argparse.Namespace) -> Import | Export | Join:
    if arguments.direction == "from-hf":
        return Import(arguments.model, arguments.dtype)
    if arguments.direction == "join":
        return Join(arguments.checkpoint)
    return Export(arguments.checkpoint, arguments.dtype)


def verify(source: Import | Export | Join, folder: Path) -> int:
    if isinstance(source, Join):
        return verify_join(source, folder)
    return verify_import(source, folder) if isinstance(source, Import) else verify_export(source, folder)


def convert(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write, verify in a fresh process, put in place; returns what was done, in numbers. Raises UserError."""
    started = time.perf_counter()
    with staged(arguments.out) as stage:
        written: Written = source_of(arguments).write(stage, arguments.out.name)
        n_tensors = verify_in_a_fresh_process(arguments, stage)
    return {
        **vars(written),
        "verified_tensors": n_tensors,
        "seconds": round(time.perf_counter() - started, 1),
    }


def verify_in_a_fresh_process(arguments: argparse.Namespace, folder: Path) -> int:
    """So that nothing which this process believes to have written counts. Raises UserError with the reason."""
    if sys.stderr.isatty():
        print("verifying in a fresh process", file=sys.stderr)
    kind = SOURCES[arguments.direction]
    source = [f"--{kind}", getattr(arguments, kind)]
    plugins = [word for plugin in arguments.plugin for word in ("--plugin", plugin)]
    options = [arguments.direction, *source, "--verify", folder, "--dtype", arguments.dtype, "--json", *plugins]
    command = [sys.executable, "-m", "moelm.convert", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        wrong = "what was written is not right, so it was removed"
        failed = f"the verification itself failed (exit {result.returncode}), so what was written was removed"
        raise UserError(f"{wrong if result.returncode == 2 else failed}:\n{result.stderr.strip()}")
    return int(json.loads(result.stdout)["tensors"])


def as_text(report: dict[str, Any], out: Path) -> str:
    summary = (
        f"{out}: {report['architecture']}, {report['n_parameters']:,} parameters, {report['n_bytes'] / 1e9:.2f} GB in "
        f"{' and '.join(report['dtypes'])}, {report['verified_tensors']:,} tensors verified, {report['seconds']} s"
    )
    return "\n".join([*(f"note: {note}" for note in report["notes"]), summary])


if __name__ == "__main__":
    command_line.run(main)

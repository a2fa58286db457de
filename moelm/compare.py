"""python -m moelm.compare FOLDER ...: finished runs side by side, one line each."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from moelm import command_line
from moelm.config import Config, UserError, from_dict, read_yaml
from moelm.data.token_shards import read_json
from moelm.model.size import model_size

EPILOG = """example:
  python -m moelm.compare checkpoints
  python -m moelm.compare checkpoints/quickstart checkpoints/sigmoid --markdown
"""


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.compare",
        "Finished runs side by side, best validation cross-entropy first: sizes, cross-entropy at the first validation "
        "and at the last, the balance of the experts, speed. The curves are in TensorBoard.",
        EPILOG,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder, or one with runs in it")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON")
    arguments = command_line.parse(parser, argv)
    rows = compare(arguments.folders)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print(as_table(rows, arguments.markdown))


def compare(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row a finished run, best last validation first. `dead_share` is of all routed experts; None where a run has
    no such number. A run that cannot be read, say for want of its plugin, is left out with a line that says so. Raises
    UserError for a folder without a finished run, and where none can be read."""
    runs = {run.resolve(): run for folder in folders for run in finished_runs(Path(folder))}
    rows = []
    for run in runs.values():
        try:
            rows.append(read_run(run))
        except UserError as error:
            if len(runs) == 1:
                raise
            print(f"left out {run}: {error}", file=sys.stderr)
    if not rows:
        raise UserError("none of the runs can be read, see above")
    return sorted(rows, key=lambda row: (row["val_ce"] is None, row["val_ce"]))


def finished_runs(folder: Path) -> list[Path]:
    """The folders with a summary.json: the given one, or those directly in it."""
    runs = [folder] if (folder / "summary.json").is_file() else sorted(s.parent for s in folder.glob("*/summary.json"))
    if not runs:
        raise UserError(f"{folder}: no finished run (summary.json) in it\n  remedy: name the folder of a run")
    return runs


def read_run(folder: Path) -> dict[str, Any]:
    summary_file = folder / "summary.json"
    try:
        summary = read_json(summary_file)
        config = from_dict(Config, read_yaml(folder / "config.yaml"))
        dead, moe = _count(summary, "moe/dead_experts"), config.model.moe
        validations = _scalars(folder, "val/ce")
        return {
            "run": str(summary["run"]),
            "total_params": _count(summary, "total_params"),
            "active_params": _count(summary, "active_params"),
            "active_params_no_embeddings": model_size(config.model).active_no_embeddings,
            "steps": _count(summary, "step"),
            "tokens": _count(summary, "tokens"),
            "first_val_step": validations[0][0] if validations else None,
            "first_val_ce": validations[0][1] if validations else None,
            "val_ce": _number(summary, "val/ce"),
            "bits_per_byte": _number(summary, "val/bits_per_byte"),
            "max_violation": _number(summary, "moe/max_violation"),
            "dead_experts": dead,
            "dead_share": None
            if dead is None or moe is None
            else dead / (moe.n_experts * len(config.model.routed_layers)),
            "tokens_per_s": _number(summary, "tokens_per_s"),
            "alarms": len(summary["alarms"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary_file}: not the summary of a run ({type(error).__name__}: {error})") from None


def _number(summary: dict[str, Any], key: str) -> int | float | None:
    """Raises TypeError for what is neither a number nor null."""
    value = summary[key]
    if value is None or type(value) in (int, float):
        return cast(int | float | None, value)
    raise TypeError(f"{key} is {value!r}")


def _count(summary: dict[str, Any], key: str) -> int | None:
    value = _number(summary, key)
    if isinstance(value, float):
        raise TypeError(f"{key} is {value!r}")
    return value


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of steps that a continued run made again
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def as_table(rows: list[dict[str, Any]], markdown: bool = False) -> str:
    steps = {row["first_val_step"] for row in rows} - {None}
    first = f"CE at step {steps.pop()}" if len(steps) == 1 else "first CE"
    columns = [
        ("run", "run", "s"),
        ("total", "total_params", ",d"),
        ("active", "active_params", ",d"),
        ("no embeddings", "active_params_no_embeddings", ",d"),
        ("steps", "steps", ",d"),
        (first, "first_val_ce", ".4f"),
        ("CE", "val_ce", ".4f"),
        ("bits/byte", "bits_per_byte", ".4f"),
        ("MaxVio", "max_violation", ".3f"),
        ("dead", "dead_experts", "d"),
        ("dead, %", "dead_share", ".1%"),
        ("tokens/s", "tokens_per_s", ",.0f"),
        ("alarms", "alarms", "d"),
    ]
    table = [[title for title, _, _ in columns]]
    for row in rows:
        table.append(["-" if row[key] is None else format(row[key], form) for _, key, form in columns])
    if markdown:
        table.insert(1, ["---", *["---:"] * (len(columns) - 1)])
        return "\n".join(f"| {' | '.join(line)} |" for line in table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in table
    )


if __name__ == "__main__":
    command_line.run(main)

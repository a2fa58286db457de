"""What the GPU benchmarks share: timing by events, spread, relative errors, the facts of a run, writing it."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "lightning", "transformers", "torchtitan", "scattermoe", "sonic-moe", "quack-kernels")


def make_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="write PREFIX.json and PREFIX.md")
    parser.add_argument("--quick", action="store_true", help="fewest repeats and sizes: does everything run?")
    return parser


def chosen(parser: argparse.ArgumentParser, text: str, among: Collection[str]) -> list[str]:
    """The names in a comma-separated option; ends the process with exit code 2 on an unknown one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in among:
            parser.error(f"{name!r} is not one of {', '.join(among)}")
    return names


def require_cuda() -> None:
    """End the process with exit code 2 where there is no GPU to measure."""
    if not torch.cuda.is_available():
        print("error: this measures an NVIDIA GPU, and torch sees none here", file=sys.stderr)
        sys.exit(2)


# ----------------------------------------------------------------------------------------------- timing


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of `values`."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def time_interleaved(
    steps: dict[str, Callable[[], Any]], rounds: int = 5, burst_ms: float = 150.0
) -> dict[str, list[list[float]]]:
    """Milliseconds of each call, by name and round.

    Clocks drift, so every round runs a burst of every step, beginning with another one each time; the first call of a
    burst is not counted. Before each call the L2 cache is overwritten, as `triton.testing.do_bench` does.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in steps}
    n_calls = {name: max(2, min(100, round(burst_ms / _burst(step, 3)[-1]))) for name, step in steps.items()}
    names = list(steps)
    for i in range(rounds):
        start = i * len(names) // rounds
        for name in names[start:] + names[:start]:
            samples[name].append(_burst(steps[name], 1 + n_calls[name])[1:])
    return samples


def _burst(step: Callable[[], Any], n_calls: int) -> list[float]:
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        for _ in range(n_calls):
            step()
            times.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(times)]
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n_calls)]
    gc.collect()
    gc.disable()
    for start, end in events:
        flush.zero_()
        start.record()
        step()
        end.record()
    gc.enable()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def spread_of(samples: Sequence[Sequence[float]]) -> dict[str, float]:
    """The spread of all calls in all rounds of `time_interleaved`."""
    return spread(list(itertools.chain.from_iterable(samples)))


def ratios(of: list[list[float]], to: list[list[float]]) -> dict[str, float]:
    """median(of) / median(to) in each round, and its spread over rounds."""
    return spread([statistics.median(a) / statistics.median(b) for a, b in zip(of, to, strict=True)])


def free_memory() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allow_recompiles() -> None:
    """Variants and sizes share code objects; over the limit they would run eagerly, and nobody would be told."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


# ----------------------------------------------------------------------------------------------- errors


def relative_error(value: Tensor, reference: Tensor) -> dict[str, float]:
    """|value - reference| / |reference|: of everything (`all`), and of the worst row against the mean norm of rows
    (`worst`), where a row is what a first index selects, a token or an expert. NaN wherever there is one."""
    wrong, norm = [], []
    for start in range(0, reference.shape[0], rows := max(1, 2**26 // reference[0].numel())):
        want = reference[start : start + rows].double().flatten(1)
        wrong.append((value[start : start + rows].double().flatten(1) - want).square().sum(1))
        norm.append(want.square().sum(1))
    wrong_R, norm_R = torch.cat(wrong), torch.cat(norm)
    return {
        "all": (wrong_R.sum() / norm_R.sum()).sqrt().item(),
        "worst": (wrong_R.max() / norm_R.mean()).sqrt().item(),
    }


# ----------------------------------------------------------------------------------------------- results


def facts() -> dict[str, Any]:
    """Where, when and with what: beside every result."""
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "without a version" if importlib.util.find_spec(package.replace("-", "")) else None


def commit() -> str:
    """From git; where the repository does not travel along, from the variable COMMIT."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("COMMIT") or git.stdout.strip() or "unknown"


def markdown_facts(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{found['device']}, {found['date']}; Python {found['python']}, {versions}."
    return f"{where}\n\n    {found['command']}        commit {found['commit']}\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column left, the others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(found: dict[str, float] | None, form: str = ".2f") -> str:
    """`median (q1 to q3)` of a `spread`."""
    return "-" if found is None else f"{found['median']:{form}} ({found['q1']:{form}} to {found['q3']:{form}})"


def write(out: Path | None, result: dict[str, Any], text: str) -> None:
    """PREFIX.json and PREFIX.md; called after every part, so that a run cut short leaves what it has."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_name(f"{out.name}.md").write_text(text, encoding="utf-8")

"""Does the fast path learn what the plain one learns? Training runs of both, with two seeds each.

Fast: as configured, compiled, with every kernel. Plain: the `grouped` experts, nothing compiled, and no Triton, so that
PyTorch's own router, loss and optimizer compute. A seed draws the initial weights and the order of the samples.

The distance of two runs is the mean difference of their training cross-entropy, each a moving mean over `WINDOW`
steps, over the second half of the steps, and the difference of the validation cross-entropy at the end. Between paths
it should be no larger than between seeds.

Left out on purpose: saving 20 GB at the end of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import measure
import torch
from measure import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moelm import command_line
from moelm.config import load_config
from moelm.data.prepare import prepare

WINDOW = 20  # steps
SEEDS = (0, 1)
PATHS = {"fast": [], "plain": ["trainer.compile=false", "model.moe.experts.backend=grouped"]}
PROGRAM = """
import sys
path, config, *overrides = sys.argv[1:]
if path == "plain":
    sys.modules["triton"] = None  # to import it fails
from moelm import command_line
from moelm.config import load_config
from moelm.moe.kernels import HAS_TRITON
from moelm.train import train
from moelm.training.saving import FolderCheckpointIO
FolderCheckpointIO.save_checkpoint = lambda *_, **__: None
command_line.import_builtins()
assert HAS_TRITON == (path == "fast"), "triton"
train(load_config(config, overrides))
"""


def run(path: str, seed: int, config: str, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """`train`, the cross-entropy of each step in nats, and `val`, that at the end; or `error`. Each seed has a GPU."""
    name = f"{path}-{seed}"
    ours = [f"run.seed={seed}", f"run.name={name}", f"run.dir={folder}", "trainer.log_every_n_steps=1"]
    ours += ["trainer.enable_progress_bar=false", *PATHS[path]]
    command = [sys.executable, "-c", PROGRAM, path, config, *overrides, *ours]
    environment = {**os.environ}
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(seed % torch.cuda.device_count())
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(f"{name}: {'done' if result.returncode == 0 else 'failed'}", file=sys.stderr, flush=True)
    if result.returncode:
        return {"error": result.stderr.strip().splitlines()[-1][:300]}
    events = EventAccumulator(str(folder / name), size_guidance={"scalars": 0})
    events.Reload()
    return {
        "train": [event.value for event in events.Scalars("train/ce")],
        "val": json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))["val/ce"],
    }


def smooth(values: list[float]) -> list[float]:
    return [mean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]


def distance(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """nats: `train`, and of its parts with sign `bias`; `val`."""
    differences = [x - y for x, y in zip(smooth(a["train"]), smooth(b["train"]), strict=True)]
    late = differences[len(differences) // 2 :]
    return {"train": mean(map(abs, late)), "bias": mean(late), "val": abs(a["val"] - b["val"])}


def distances(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Between the paths for each seed, and between the seeds for each path; runs that failed are left out."""
    pairs = {f"fast and plain, seed {seed}": (f"fast-{seed}", f"plain-{seed}") for seed in SEEDS}
    pairs |= {
        f"seeds {SEEDS[0]} and {SEEDS[1]}, {path}": (f"{path}-{SEEDS[0]}", f"{path}-{SEEDS[1]}") for path in PATHS
    }
    complete = {name: pair for name, pair in pairs.items() if all("train" in runs[each] for each in pair)}
    return {name: distance(*(runs[each] for each in pair)) for name, pair in complete.items()}


def markdown(result: dict[str, Any]) -> str:
    runs, parts = result["runs"], ["# Loss curves of the fast and the plain path\n"]
    parts.append(measure.markdown_facts(result["facts"]))
    n_steps = max((len(found.get("train", [])) for found in runs.values()), default=0)
    steps = list(range(50, n_steps + 1, 50))
    rows = [
        [name, *[f"{smooth(found['train'])[step - 1]:.4f}" for step in steps], f"{found['val']:.4f}"]
        for name, found in runs.items()
        if "train" in found
    ]
    parts.append(
        f"Cross-entropy in nats a token: of training, mean of the last {WINDOW} steps; of validation at the end.\n"
    )
    parts.append(measure.markdown_table(["path-seed", *[f"step {step}" for step in steps], "validation"], rows))
    parts += [f"{name}: {found['error']}\n" for name, found in runs.items() if "error" in found]
    rows = [
        [name, f"{found['train']:.4f}", f"{found['bias']:+.4f}", f"{found['val']:.4f}"]
        for name, found in result["distances"].items()
    ]
    columns = ["distance between", "training, mean of the absolute", "with sign", "validation"]
    parts.append(measure.markdown_table(columns, rows))
    return "\n".join(parts)


def main() -> None:
    parser = measure.make_parser(
        __doc__, "python benchmarks/loss_curves.py --out PREFIX data.corpus=configs/data/packages.yaml"
    )
    parser.add_argument("--config", default=str(ROOT / "configs/bench/moe_1_7b.yaml"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; nothing is timed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, for all runs")
    arguments = parser.parse_args()
    measure.require_cuda()
    if arguments.quick:
        arguments.steps = 60
    measure_runs(arguments)


def measure_runs(arguments: argparse.Namespace) -> dict[str, Any]:
    command_line.import_builtins()
    overrides = [f"trainer.max_steps={arguments.steps}", *arguments.overrides]
    prepare(load_config(arguments.config, overrides).data.corpus)  # once, and not by each run
    cases = list(product(PATHS, SEEDS))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda case: run(*case, arguments.config, Path(folder), overrides), cases)
        runs = {f"{path}-{seed}": each for (path, seed), each in zip(cases, found, strict=True)}
    result = {"facts": measure.facts(), "runs": runs, "distances": distances(runs)}
    measure.write(arguments.out, result, markdown(result))
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()

"""What the observatory costs: the model of train_100m.py with the default callbacks against `throughput` alone.

Runs alternate in one process; a rate is tokens over the whole time between the first and the last of the settled log
steps, so that images and files, which fall on few steps, are in it. Validation is left out of both.

    python benchmarks/callbacks_cost.py --out benchmarks/results/callbacks_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from measure import ROOT, commit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_100m import OVERRIDES

from moelm import command_line
from moelm.config import load_config
from moelm.train import train

VARIANTS = {"default": [], "throughput": ["callbacks=[throughput]"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    command_line.import_builtins()
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for name, changes in VARIANTS.items():
                rates[name].append(
                    rate_of(folder, f"{name}-{repeat}", [*changes, *arguments.overrides], arguments.steps)
                )
                print(f"{name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit(),
        "steps": arguments.steps,
        "tokens_per_s": {name: {"median": medians[name], "all": values} for name, values in rates.items()},
        "cost_of_step_time": medians["throughput"] / medians["default"] - 1,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def rate_of(folder: str, name: str, changes: list[str], steps: int) -> float:
    """Tokens a second from log step 5 (compiled, warm) to the last one."""
    config = load_config(
        ROOT / "configs/quickstart.yaml",
        [
            *OVERRIDES,
            f"trainer.max_steps={steps}",
            "data.val_every_n_steps=100000",
            "checkpoint.every_n_steps=100000",
            "trainer.limit_val_batches=2",
            f"run.name={name}",
            f"run.dir={folder}/runs",
            f"data.corpus.dir={folder}/data",
            *changes,
        ],
    )
    torch._dynamo.reset()
    train(config)
    events = EventAccumulator(str(config.run_folder))
    events.Reload()
    settled = [event.value for event in events.Scalars("perf/tokens_per_s")][4:]
    return len(settled) / sum(1 / rate for rate in settled)


if __name__ == "__main__":
    main()

"""Peak memory and time of `moelm.convert` in both directions, on a random model of EuroMoE's shape (2.6 B parameters).

The model is written to the disk in one file, as training writes it (which alone needs memory for all of it), converted
to the format of transformers and back, each in a process of its own whose peak memory is measured together with that of
the process that verifies for it. At the end the tensors that came back are compared with the first ones by their
checksums.

    python benchmarks/convert_memory.py --folder /tmp --dtype bfloat16

It takes three times the size of the weights on the disk, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moelm.command_line import import_builtins
from moelm.config import Config, ModelConfig, from_dict, to_yaml
from moelm.hub.streaming import ShardWriter, cast, empty_state
from moelm.training.checkpoint_io import weight_files, write_manifest
from moelm.training.weight_files import TensorFiles

EUROMOE = {
    "n_layers": 24,
    "d_model": 1024,
    "vocab_size": 128_000,
    "attention": {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "head_dim": 128},
    "moe": {
        "n_experts": 64,
        "top_k": 8,
        "d_expert": 512,
        "router": {"name": "top_k", "normalize_gates": "after_top_k"},
    },
    "tied_embeddings": True,
}


def write_model(folder: Path, dtype: str) -> int:
    """A checkpoint of weights alone, of random numbers; returns how many."""
    config = Config(model=from_dict(ModelConfig, EUROMOE, "model"))
    empty, state = empty_state(config.model)
    folder.mkdir()
    shards = ShardWriter(folder, shard_bytes=2**60)
    for i, (name, tensor) in enumerate(empty.items()):
        values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        shards.add(name, cast(values, name, dtype, name in state))
    shards.flush()
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_manifest(folder, step=0)
    return shards.n_elements


def checksums(checkpoint: Path) -> dict[str, str]:
    tensors = TensorFiles(weight_files(checkpoint))
    return {
        name: hashlib.sha256(tensors[name].flatten().view(torch.uint8).numpy()).hexdigest() for name in sorted(tensors)
    }


def in_a_process_of_its_own(step: str, *arguments: str | Path) -> str:
    """One of STEPS. A process that has ever been large would pass its peak on to those that it starts."""
    command = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


STEPS: dict[str, Callable[..., object]] = {
    "write": lambda folder, dtype: write_model(Path(folder), dtype),
    "checksums": lambda folder: checksums(Path(folder)),
}


def measure(*arguments: str | Path) -> dict[str, float]:
    """Seconds, and the peak resident memory (which counts pages of mapped files) of the process or its child."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "moelm.convert", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"convert {arguments[0]} failed")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room; default: the temporary folder of the system")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import_builtins()
    if arguments.step is not None:
        step, *values = arguments.step
        print(json.dumps(STEPS[step](*values)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert-memory-") as name:
        first, exported, back = (Path(name) / part for part in ("first", "exported", "back"))
        n_parameters = int(in_a_process_of_its_own("write", first, arguments.dtype))
        results = {
            "parameters": n_parameters,
            "dtype": arguments.dtype,
            "gb": round(sum(file.stat().st_size for file in first.iterdir()) / 1e9, 2),
            "to-hf": measure("to-hf", "--checkpoint", first, "--out", exported),
            "from-hf": measure("from-hf", "--model", exported, "--out", back),
            "came_back_bit_equal": in_a_process_of_its_own("checksums", first)
            == in_a_process_of_its_own("checksums", back),
        }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

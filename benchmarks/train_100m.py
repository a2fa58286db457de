"""The quickstart's recipe at about 100 M parameters on one GPU, through `moelm.train`, under bf16-mixed.

Reports what the run itself logged (perf/tokens_per_s, perf/mfu) beside an independent computation of MFU from
the config's numbers, and the peak memory beside the estimate of `moelm.info`.

    python benchmarks/train_100m.py --out benchmarks/results/train_100m.json
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

from moelm import command_line
from moelm.config import load_config
from moelm.info import info
from moelm.train import train

PEAK = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
N_LAYERS, D, HEADS, KV_HEADS, F, E, K, V, L = 6, 768, 12, 4, 768, 8, 2, 4096, 1024
OVERRIDES = [
    f"model.n_layers={N_LAYERS}",
    f"model.d_model={D}",
    f"model.vocab_size={V}",
    f"model.attention.n_heads={HEADS}",
    f"model.attention.n_kv_heads={KV_HEADS}",
    f"model.moe.n_experts={E}",
    f"model.moe.top_k={K}",
    f"model.moe.d_expert={F}",
    f"data.corpus.tokenizer.vocab_size={V}",
    f"data.seq_len={L}",
    "optim.batch_tokens=65536",
    "optim.micro_batch_size=64",
    "optim.lr=1e-3",
    "trainer.precision=bf16-mixed",
    "trainer.log_every_n_steps=20",
    "trainer.devices=1",
]


def flops_per_token_by_hand() -> int:
    """Multiply-adds of every matrix that a token meets, forward 2, backward 4; causal attention counted half."""
    head_dim = D // HEADS
    attention = D * HEADS * head_dim * 2 + D * KV_HEADS * head_dim * 2
    experts = K * 3 * D * F
    router = D * E
    scores = 2 * HEADS * head_dim * L / 2  # q k^T and weights times v, half of the L keys on average
    return round(6 * (N_LAYERS * (attention + experts + router + scores) + D * V))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    command_line.import_builtins()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            ROOT / "configs/quickstart.yaml",
            [
                *OVERRIDES,
                f"trainer.max_steps={arguments.steps}",
                "data.val_every_n_steps=100000",
                f"run.dir={folder}/runs",
                f"data.corpus.dir={folder}/data",
                *arguments.overrides,
            ],
        )
        torch.cuda.reset_peak_memory_stats()
        summary = train(config)
        events = EventAccumulator(str(config.run_folder))
        events.Reload()
        scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    settled = scalars["perf/tokens_per_s"][len(scalars["perf/tokens_per_s"]) // 3 :]
    device = torch.cuda.get_device_name()
    rate = statistics.median(settled)
    facts = info(config)
    result = {
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
        "model": facts["name"],
        "tokens_per_s": {"median": rate, "min": min(settled), "max": max(settled), "n": len(settled)},
        "mfu_logged": statistics.median(scalars["perf/mfu"][len(scalars["perf/mfu"]) // 3 :]),
        "mfu_by_hand": rate * flops_per_token_by_hand() / PEAK[device],
        "peak_memory_gib": max(scalars["perf/peak_memory_gib"]),
        "estimated_memory_gib": facts["memory_gib"],
        "estimated_parts_gib": facts["memory_parts_gib"],
        "val/ce": summary["val/ce"],
        "val/bits_per_byte": summary["val/bits_per_byte"],
        "moe/max_violation": summary["moe/max_violation"],
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

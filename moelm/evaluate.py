"""python -m moelm.evaluate --checkpoint RUN_OR_STEP: cross-entropy and expert load of a checkpoint, by domain."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moelm import command_line
from moelm.config import ModelConfig, load_corpus
from moelm.data.datamodule import validation_loader
from moelm.data.prepare import prepare, prepare_for_tokenizer
from moelm.data.token_shards import DataError
from moelm.moe.load_metrics import dead_experts, dropped, max_violation
from moelm.training.checkpoint_io import find_checkpoint, has_file, tokenizer_file
from moelm.training.evaluation import Evaluation, EvaluationSums, forward_batch
from moelm.training.loading import autocast, check_tokenizer, load_model

EPILOG = """example:
  python -m moelm.evaluate --checkpoint checkpoints/quickstart
  python -m moelm.evaluate --checkpoint checkpoints/quickstart/step-00000650 --data configs/data/stdlib.yaml --json
"""


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.evaluate",
        "Token-weighted cross-entropy, perplexity and bits per byte over a validation split, by domain, "
        "with the load of the experts in each domain.",
        EPILOG,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_STEP")
    parser.add_argument("--data", metavar="F", help="a configs/data/*.yaml; default: the run's own data")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = command_line.parse(parser, argv)
    results, model = _evaluate(arguments.checkpoint, arguments.data)
    if arguments.json:
        print(json.dumps({domain: as_dict(result) for domain, result in results.items()}, indent=1))
    else:
        print(as_table(results, [model.layer_name(layer) for layer in model.routed_layers]))


def evaluate(checkpoint: str | Path, data: str | Path | None = None) -> dict[str, Evaluation]:
    """Domain -> its Evaluation, "all" first; every token of the validation split is predicted once.

    Raises UserError: no valid checkpoint, or data that was tokenised with another tokenizer.
    """
    return _evaluate(checkpoint, data)[0]


def _evaluate(checkpoint: str | Path, data: str | Path | None) -> tuple[dict[str, Evaluation], ModelConfig]:
    folder = find_checkpoint(checkpoint)
    tokenizer = tokenizer_file(folder)
    if data is None and not has_file(folder, "training.pt"):
        raise DataError(f"{folder}: was converted, so it has no data of its own\n  remedy: name some with --data")
    model, config, device = load_model(folder)
    if data is None:
        shards = prepare(config.data.corpus)
        check_tokenizer(folder, shards, "evaluate with --data, which uses the checkpoint's tokenizer")
    else:
        end_of_text = config.data.corpus.tokenizer.end_of_text
        shards = prepare_for_tokenizer(load_corpus(data), tokenizer, end_of_text)
    loader = validation_loader(shards, config.data.seq_len, config.optim.micro_batch_size)
    sums = EvaluationSums(shards.domains)
    separator = shards.end_of_text_id if config.data.mask_documents else None
    with torch.no_grad(), autocast(config, device):
        for batch in tqdm(loader, desc="evaluating", unit="batch", file=sys.stderr, leave=False, disable=None):
            on_device = {name: value.to(device) for name, value in batch.items()}
            sums.add(on_device, forward_batch(model, on_device, separator))
    return sums.results(), config.model


def as_dict(result: Evaluation) -> dict[str, Any]:
    load = torch.tensor(result.load, dtype=torch.float64)
    return {
        "tokens": result.tokens,
        "bytes": result.bytes,
        **result.scalars(),
        "load": result.load,
        "max_violation": max_violation(load).tolist() if result.load else [],
        "dead_experts": dead_experts(load).tolist() if result.load else [],
        "dropped": dropped(load, torch.tensor(result.kept, dtype=torch.float64)).tolist() if result.load else [],
    }


def as_table(results: dict[str, Evaluation], layer_names: list[str]) -> str:
    """`layer_names`: of the rows of `Evaluation.load`."""
    lines = [
        f"{'domain':<16}{'tokens':>12}{'ce (nats)':>12}{'perplexity':>12}{'bits/byte':>12}{'MaxVio':>9}{'dead':>6}"
    ]
    for domain, result in results.items():
        load = torch.tensor(result.load, dtype=torch.float64)
        balance = f"{max_violation(load).mean():>9.3f}{int(dead_experts(load).sum()):>6}" if result.load else ""
        lines.append(
            f"{domain[:15]:<16}{result.tokens:>12,}{result.ce:>12.4f}{result.perplexity:>12.2f}"
            f"{result.bits_per_byte:>12.4f}{balance}"
        )
    if results["all"].load:
        lines += ["", "share of the routed tokens, in percent, by MoE layer and expert"]
        width = max(map(len, layer_names))
        for domain, result in results.items():
            for i, load_E in enumerate(result.load):
                total = max(1, sum(load_E))
                shares = " ".join(f"{100 * n / total:5.1f}" for n in load_E[:16])
                row = f"{domain[:15] if i == 0 else '':<16}{layer_names[i]:>{width + 1}}  {shares}"
                lines.append(row + " ..." * (len(load_E) > 16))
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)

"""Cross-entropy, bits per byte and expert load over a validation set, by domain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moelm.model.gpt import GPT, GPTOutput
from moelm.training.statistics import all_reduce_sums


@dataclass(frozen=True)
class Evaluation:
    """Token-weighted results of one domain or of all."""

    tokens: int
    bytes: float
    ce: float  # nats a token
    load: list[list[int]]  # choices by MoE layer and expert; [] for a dense model
    kept: list[list[int]]  # the same after capacity

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.ce, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.ce * self.tokens / math.log(2) / self.bytes

    def scalars(self) -> dict[str, float]:
        return {"ce": self.ce, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


class EvaluationSums:
    """Sums over batches, float64; then over ranks in one all-reduce."""

    def __init__(self, domains: list[str]) -> None:
        self.domains = domains
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, batch: dict[str, Tensor], output: GPTOutput) -> None:
        """One batch of `data.datamodule`'s validation loader and what the model returned for it."""
        assert output.ce_BL is not None
        by_row = {
            "ce": output.ce_BL.double().sum(1),
            "tokens": batch["mask"].double().sum(1),
            "bytes": batch["n_bytes"].double(),
        }
        if output.stats is not None:
            by_row["load"] = output.stats.load_BE.double().transpose(0, 1)  # [B, M, E]
            by_row["kept"] = output.stats.kept_BE.double().transpose(0, 1)
        for name, value in by_row.items():
            if name not in self._sums:
                self._sums[name] = value.new_zeros(len(self.domains), *value.shape[1:])
            self._sums[name].index_add_(0, batch["domain"], value)

    def results(self) -> dict[str, Evaluation]:
        """Domain -> its Evaluation, and "all" first. Raises ValueError if nothing was added."""
        if not self._sums:
            raise ValueError("no validation batch was evaluated")
        sums = all_reduce_sums(self._sums)
        everything = {name: value.sum(0) for name, value in sums.items()}
        results = {"all": _evaluation(everything)}
        for i, domain in enumerate(self.domains):
            if sums["tokens"][i] > 0:
                results[domain] = _evaluation({name: value[i] for name, value in sums.items()})
        return results


def _evaluation(sums: dict[str, Tensor]) -> Evaluation:
    tokens = int(sums["tokens"])
    load, kept = (sums[name].long().tolist() if name in sums else [] for name in ("load", "kept"))
    return Evaluation(tokens, float(sums["bytes"]), float(sums["ce"]) / max(tokens, 1), load, kept)


def forward_batch(model: GPT, batch: dict[str, Tensor], end_of_text: int | None) -> GPTOutput:
    """The loss of one batch of either loader; `end_of_text` is given if attention stays within documents."""
    inputs_BL = batch["inputs"]
    document_ids_BL = None if end_of_text is None else (inputs_BL == end_of_text).cumsum(1)
    output: GPTOutput = model(
        inputs_BL, batch["targets"], token_mask_BL=batch.get("mask"), document_ids_BL=document_ids_BL
    )
    return output

"""What a run says of itself is what was counted by hand: at the routers' outputs, in the batches, in the gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moelm.config import UserError, to_dict
from moelm.model.size import flops_per_token
from moelm.verify.lab import Broken, Lab, Row, Run
from moelm.verify.same import curves_of, distance

STEPS = ("trainer.max_steps=8", "data.val_every_n_steps=3", "checkpoint.every_n_steps=8", "trainer.compile=false")
MODES = {"": (), ", recomputed": ("trainer.activation_checkpointing=full",)}


def rows(lab: Lab, full: bool) -> Iterator[Row]:
    if not lab.config.model.moe_layers:
        raise UserError("model.moe: a dense model counts no experts\n  remedy: verify resume, kill, preempt or nan")
    for ranks in lab.devices:
        modes = {**MODES, ", fsdp": ("trainer.strategy=fsdp",)} if ranks > 1 and full else MODES
        for name, overrides in modes.items():
            yield Row(f"{ranks} x counts{name}", partial(counted, lab, ranks, *overrides))
    yield Row("balancing losses reach the routers", partial(balanced, lab))


def counted(lab: Lab, ranks: int, *overrides: str) -> str:
    """A validation and a save lie between, and neither may count."""
    run = lab.start(f"counted-{len(lab.runs)}", *STEPS, *overrides, ranks=ranks, witnesses=["verify_counts"])
    run.must_end_with(0)
    by_rank = [run.lines("counts", rank) for rank in range(ranks)]
    flops = tiny_flops(lab) if lab.is_tiny else flops_per_token(run.config.model, run.config.data.seq_len)
    micro_batches = run.config.optim.batch_tokens // (run.config.optim.micro_batch_size * run.config.data.seq_len)
    logged, bias_ME = curves_of(run.folder), None
    for i, lines in enumerate(zip(*by_rank, strict=True)):
        step = i + 1
        load_ME = np.sum([line["found"]["load"] for line in lines], axis=0)
        tokens = sum(line["found"]["tokens"] for line in lines)
        made = sum(line["found"]["micro_batches"] for line in lines)
        bias_ME = moved_bias(run, bias_ME, load_ME)
        expected = {
            "step": step,
            "load": load_ME.tolist(),
            "tokens": tokens,
            "flops": float(np.float32(tokens * flops)),
        }
        curves = {tag: float(logged[f"train/{tag}"]["values"][i]) for tag in ("tokens", "flops")}
        for rank, line in enumerate(lines):
            found = {**line["said"], **curves}
            for key, value in expected.items():
                if found[key] != value:
                    raise Broken(f"step {step}: rank {rank} says {key} {found[key]}, counted {value}")
            if bias_ME is not None:  # CUDA's mean is a product with 1 / n
                biases = [torch.tensor(each, dtype=torch.float32) for each in (found["bias"], bias_ME.tolist())]
                distance(biases[0], biases[1], f"step {step}: bias of rank {rank}", 1e-6 if lab.on_cuda else 0.0)
        if made != step * micro_batches:
            raise Broken(f"step {step} came after {made} micro-batches, not {step * micro_batches}")
    if i + 1 != 8 or run.newest_step != 8:
        raise Broken(f"{i + 1} steps were counted, step {run.newest_step} is saved")
    return f"8 steps of {micro_batches} micro-batches: {tokens:,} tokens, {load_ME.sum():,} choices a step" + (
        ", biases" if bias_ME is not None else ""
    )


def moved_bias(run: Run, bias_ME: Any, load_ME: Any) -> Any:
    """b += rate x s, s = sign(mean load - load), centred if wanted, in float32; None where a config has other rules."""
    moe = run.config.model.moe
    balancers = [each for each in to_dict(moe)["balancers"] if each["name"] == "loss_free"]
    if len(balancers) != 1 or balancers[0]["rule"] != "sign" or balancers[0]["stop_step"]:
        return None
    sign_ME = np.sign(load_ME.mean(1, keepdims=True) - load_ME).astype(np.float32)
    if balancers[0]["centred"]:
        sign_ME -= sign_ME.mean(1, keepdims=True, dtype=np.float32)
    return (0 if bias_ME is None else bias_ME) + np.float32(balancers[0]["rate"]) * sign_ME


def tiny_flops(lab: Lab) -> int:
    """A token of `TINY`: 2 operations for a multiply-add, and twice that backward; it attends to half a sequence."""
    model = to_dict(lab.config)["model"]
    d, layers, moe, attention = model["d_model"], model["n_layers"], model["moe"], model["attention"]
    kv = d // attention["n_heads"] * attention["n_kv_heads"]
    block = 2 * d * d + 2 * d * kv + d * moe["n_experts"] + moe["top_k"] * 3 * d * moe["d_expert"]
    scores = 2 * d * lab.config.data.seq_len // 2  # and the weighted sum
    return int(6 * (layers * (block + scores) + model["vocab_size"] * d))


def balanced(lab: Lab) -> str:
    """With twice the coefficients their part of the routers' gradients is twice as large, and it is there."""
    balancers = to_dict(lab.config.model.moe)["balancers"]
    if not any(each.get("coef") for each in balancers):
        return "no balancer with a coefficient"
    gradients = []
    for factor in (0, 100, 200):  # so large that it is not lost in rounding
        scaled = [{**each, "coef": factor * each["coef"]} if "coef" in each else each for each in balancers]
        steps = (
            "trainer.max_steps=1",
            "optim.schedule={name: constant, warmup_steps: 0}",
            f"model.moe.balancers={json.dumps(scaled)}",
        )
        run = lab.start(f"coef-{len(lab.runs)}", *steps, witnesses=["verify_gradients"])
        run.must_end_with(0)
        gradients.append(router_gradients(torch.load(run.folder / "gradients-0.pt", weights_only=True)[0]["gradients"]))
    part, twice = gradients[1] - gradients[0], gradients[2] - gradients[0]
    share = float(part.norm() / gradients[0].norm())
    ratio = float((twice @ part) / (part @ part)) if share else 0.0
    if share < 1e-3 or abs(ratio - 2) > 0.01:
        raise Broken(f"of 100 x coef {share:.1e} of the gradient is theirs; of 200 x {ratio:.3f} times as much, not 2")
    return f"at 100 x coef {share:.2f} times the other gradients; at 200 x {ratio:.4f} times as much"


def router_gradients(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for name, value in gradients.items() if ".router." in name])

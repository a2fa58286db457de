"""Muon against torch's own for single matrices, and against a loop for stacked and fused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_resume import assert_same_state, named
from tiny_runs import Recorder, scalars_of
from torch import Tensor, nn

from moelm.config import Config, OptimConfig
from moelm.model.gpt import GPT
from moelm.train import train
from moelm.training import muon
from moelm.training.checkpoint_io import load_training, step_folder
from moelm.training.muon import MuonAdamW, newton_schulz_dtype, orthogonalize
from moelm.training.optim import build_optimizer

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
# torch.optim.Muon is bf16 everywhere; a CPU on which that is slow takes float32 here, 1 to 2 % of an update away
EXACT = newton_schulz_dtype(torch.device("cpu")) == torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torch_muon(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    options = {key: OPTIONS[key] for key in ("lr", "momentum", "weight_decay")}
    return torch.optim.Muon(parameters, **options, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw")


def take_steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: Callable[[int], list[Tensor]]
) -> None:
    for step in range(5):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def assert_close(ours: Tensor, theirs: Tensor, start: Tensor) -> None:
    """Relative to how far the weights moved."""
    assert (theirs - start).norm() > 0.05 * start.norm()
    assert (ours - theirs).norm() <= (1e-6 if EXACT else 0.03) * (theirs - start).norm()


def test_a_matrix_moves_as_under_muon_of_torch() -> None:
    shapes = [(24, 40), (40, 24), (32, 32), (1, 16)]
    ours, theirs = ([nn.Parameter(random(*shape)) for shape in shapes] for _ in range(2))
    for parameters, optimizer in [
        (ours, MuonAdamW([{"params": ours, "rule": "muon"}], **OPTIONS)),
        (theirs, torch_muon(theirs)),
    ]:
        take_steps(optimizer, parameters, lambda step: [random(*shape, seed=step + 1) for shape in shapes])
    for shape, a, b in zip(shapes, ours, theirs, strict=True):
        assert_close(a.detach(), b.detach(), random(*shape))


@pytest.mark.parametrize(
    ("shape", "halves"), [((3, 24, 20), None), ((3, 24, 40), -1), ((3, 16, 64), -1), ((40, 24), 0)]
)
def test_every_expert_and_each_of_gate_and_up_moves_as_if_it_were_alone(
    shape: tuple[int, ...], halves: int | None
) -> None:
    def alone(stacked: Tensor) -> list[Tensor]:
        """Each matrix as the published models keep it: expert by expert [out, in], gate and up apart."""
        experts = [expert.T for expert in stacked] if stacked.ndim == 3 else [stacked]
        parts = [part for expert in experts for part in (expert.chunk(2, 0) if halves is not None else (expert,))]
        return [part.clone() for part in parts]

    def gradient(step: int) -> Tensor:  # of matrices that differ much in size, as experts' do
        gradient = random(*shape, seed=step + 1)
        gradient[0] *= 100
        return gradient

    ours = nn.Parameter(random(*shape))
    theirs = [nn.Parameter(matrix) for matrix in alone(random(*shape))]
    assert len(theirs) == (shape[0] if len(shape) == 3 else 1) * (1 if halves is None else 2)
    optimizer = MuonAdamW([{"params": [ours], "rule": "muon", "halves": halves}], **OPTIONS)
    take_steps(optimizer, [ours], lambda step: [gradient(step)])
    take_steps(torch_muon(theirs), theirs, lambda step: alone(gradient(step)))
    starts = alone(random(*shape))
    for a, b, start in zip(alone(ours.detach()), theirs, starts, strict=True):
        assert_close(a, b.detach(), start)


def test_what_is_no_matrix_moves_as_under_adamw() -> None:
    shapes = [(7,), (30, 8), ()]
    ours, theirs = ([nn.Parameter(random(*shape)) for shape in shapes] for _ in range(2))
    matrix = nn.Parameter(random(4, 6))
    adamw = {key: OPTIONS[key] for key in ("lr", "betas", "eps")}
    groups = [{"params": ours[:1], "weight_decay": 0.0}, {"params": ours[1:]}, {"params": [matrix], "rule": "muon"}]
    take_steps(MuonAdamW(groups, **OPTIONS), ours, lambda step: [random(*shape, seed=step) for shape in shapes])
    groups = [{"params": theirs[:1], "weight_decay": 0.0}, {"params": theirs[1:], "weight_decay": 0.3}]
    reference = torch.optim.AdamW(groups, **adamw, fused=True)
    take_steps(reference, theirs, lambda step: [random(*shape, seed=step) for shape in shapes])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(matrix, random(4, 6)), "moved without a gradient"


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_an_update_is_nearly_orthogonal_whatever_the_size_of_the_gradient(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    gradient = random(4, 48, 160)
    gradient[1] *= 1e-5
    gradient[2] = 0
    for update in (orthogonalize(gradient), orthogonalize(gradient.mT.contiguous()).mT):
        assert update.dtype == (torch.bfloat16 if capability == "AVX512" else torch.float32)
        assert not update[2].any(), "an expert without tokens"
        for i in (0, 1, 3):
            u, values, v = torch.linalg.svd(gradient[i], full_matrices=False)
            assert values.max() > 3 * values.min(), "was orthogonal before"
            sizes = torch.linalg.svdvals(update[i].float())
            assert 0.6 < sizes.min() < sizes.max() < 1.3
            polar = u @ v
            assert (update[i].float() * polar).sum() / (update[i].float().norm() * polar.norm()) > 0.98


MODEL = {
    "model.n_layers": 3,
    "model.tied_embeddings": False,
    "model.attention": {
        **{"name": "mla", "n_heads": 2, "q_latent_dim": 16, "kv_latent_dim": 16},
        **{"nope_head_dim": 8, "rope_head_dim": 8, "v_head_dim": 8},
    },
    "model.moe": {
        **{"n_experts": 4, "top_k": 2, "d_expert": 16, "n_shared_experts": 1, "first_moe_layer": 1},
        **{"router": {"name": "top_k", "trained_bias": True}, "experts": {"bias": True}, "shared_gate": True},
    },
    "optim.optimizer": "muon",
}


def test_muon_gets_the_matrices_and_adamw_norms_biases_embedding_and_head(tiny: Callable[..., Config]) -> None:
    config = tiny(MODEL)
    model = GPT(config.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config.optim).param_groups
    rule = {names[id(p)]: (g["rule"], g["halves"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rule) == len(names) == sum(len(group["params"]) for group in groups)
    matrices = {name for name, (which, _, _) in rule.items() if which == "muon"}
    assert set(names.values()) - matrices == {
        *("embedding.weight", "head.weight", "norm.weight"),
        *(name for name in names.values() if name.endswith(("norm.weight", "bias"))),
    }
    assert {name for name in matrices if rule[name][1] == 0} == {
        "blocks.0.feed_forward.gate_up.weight",
        *(f"blocks.{i}.moe.shared.gate_up.weight" for i in (1, 2)),
    }
    assert {name for name in matrices if rule[name][1] == -1} == {f"blocks.{i}.moe.experts.gate_up" for i in (1, 2)}
    for name in ("blocks.1.moe.router.weight", "blocks.1.attention.kv_expand.weight", "blocks.2.moe.experts.down"):
        assert rule[name] == ("muon", None, 0.1)
    assert rule["head.weight"] == ("adamw", None, 0.1)
    assert rule["embedding.weight"] == ("adamw", None, 0.0)
    plain = build_optimizer(model, OptimConfig(optimizer="muon", momentum=0.5, lr=0.25, eps=1e-3, betas=[0.1, 0.2]))
    for group in plain.param_groups:
        assert (group["momentum"], group["lr"], group["eps"], group["betas"]) == (0.5, 0.25, 1e-3, (0.1, 0.2))


def test_a_run_with_muon_learns_and_resumes_bitwise(tiny: Callable[..., Config]) -> None:
    config = tiny({**MODEL, "trainer.max_steps": 30, "checkpoint.every_n_steps": 12, "trainer.log_every_n_steps": 1})
    straight, broken = named(config, "straight"), named(config, "broken")
    train(straight)
    whole = Recorder.made[-1]
    assert sum(whole.losses[-5:]) / 5 < whole.losses[0] - 0.7
    assert len({value for _, value in scalars_of(straight.run_folder)["train/lr"]}) > 20
    Recorder.raise_after = 17
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    train(broken, resume="auto")
    assert whole.losses[12:] == Recorder.made[-1].losses
    last = step_folder(broken.run_folder, 30)
    assert_same_state(step_folder(straight.run_folder, 30), last)
    states = load_training(last)["optimizer_states"][0]["state"].values()
    assert {frozenset(state) for state in states} == {
        frozenset({"momentum"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }


def test_the_constants_are_those_of_torch() -> None:
    defaults = torch.optim.Muon([nn.Parameter(random(2, 2))]).defaults
    assert defaults["ns_coefficients"] == muon.NEWTON_SCHULZ
    assert defaults["ns_steps"] == muon.NEWTON_SCHULZ_STEPS
    assert defaults["momentum"] == OptimConfig().momentum

"""Every registered router keeps the contracts; a broken one is caught by each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import broken
import pytest
import router_contracts
import torch
from router_contracts import CONTRACTS, L, make_batch, make_gpt

from moelm.config import ModelConfig, RouterConfig, registered

TOP_K = {"switch": 1}  # where the default of 2 is refused
ROUTERS = sorted(registered("router"))
QUICKLY = ("top_k", "expert_choice")  # of the routers, what is compiled in `make test` too


def with_each_contract(name: str, things: dict[str, Any], quickly: Collection[str]) -> pytest.MarkDecorator:
    """To compile takes seconds: only some of the things do so where tests are to be quick."""
    cases = []
    for key, thing in things.items():
        for contract in CONTRACTS:
            is_slow = contract is router_contracts.compiled_equals_eager and key not in quickly
            marks = [pytest.mark.slow] if is_slow else []
            cases.append(pytest.param(thing, contract, id=f"{key}-{contract.__name__}", marks=marks))
    return pytest.mark.parametrize((name, "contract"), cases)


def config_with(tiny_config: Callable[..., ModelConfig], router: str, **options: Any) -> ModelConfig:
    moe: dict[str, Any] = {"router": {"name": router, **options}, "top_k": TOP_K.get(router, 2)}
    config_class = registered("router")[router]
    assert issubclass(config_class, RouterConfig)
    if config_class.balanced:
        moe["balancers"] = []
    return tiny_config(moe=moe)


@with_each_contract("router", dict(zip(ROUTERS, ROUTERS, strict=True)), QUICKLY)
def test_every_router_keeps_the_contract(tiny_config, router, contract):
    contract(config_with(tiny_config, router))


@pytest.mark.parametrize(
    "router", [name for name in ROUTERS if "jitter" in registered("router")[name].__dataclass_fields__]
)
@pytest.mark.parametrize("contract", ["checkpointed_equals_plain", "evaluation_is_free_of_noise"])
def test_jitter_and_the_common_options_keep_it_too(tiny_config, router, contract):
    config = config_with(tiny_config, router, jitter=0.3, logit_soft_cap=2.0, trained_bias=True, route_scale=1.5)
    getattr(router_contracts, contract)(config)


@with_each_contract("dispatch", {name: name for name in sorted(registered("dispatch"))}, [])
def test_every_dispatcher_keeps_it_too(tiny_config, dispatch, contract):
    contract(tiny_config(moe={"dispatch": dispatch}))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("attention", sorted(registered("attention")))
def test_every_attention_keeps_it_too(tiny_config, attention, contract):
    contract(tiny_config(attention={"name": attention, "n_heads": 4}))


ATTENTION_OPTIONS = {
    "gqa, all options": {
        **{"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "head", "qkv_bias": True, "out_bias": True},
        **{"clip_qkv": 1.0, "sinks": True, "sliding_window": 3, "rope_interleaved": True},
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_context": 8},
    },
    "mla with a latent of q": {"name": "mla", "n_heads": 4, "q_latent_dim": 8},
    "two kinds in turn": [{"name": "gqa", "n_heads": 4, "sliding_window": 3}, {"name": "mla", "n_heads": 2}],
}


@with_each_contract("options", ATTENTION_OPTIONS, [])
def test_the_options_of_attentions_keep_it_too(tiny_config, options, contract):
    contract(tiny_config(attention=options))


@pytest.mark.parametrize(("fault", "contract"), broken.ROUTER_FAULTS.items())
def test_a_broken_router_breaks_the_contract(tiny_config, fault, contract):
    with broken.broken_things_registered():
        config = tiny_config()
        config.moe = broken.with_fault(config.moe, fault)
        with pytest.raises((AssertionError, torch._dynamo.exc.TorchDynamoException)):
            getattr(router_contracts, contract)(config)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_the_broken_router_without_its_fault_keeps_every_contract(tiny_config, contract):
    with broken.broken_things_registered():
        config = tiny_config()
        contract(replace(config, moe=broken.with_fault(config.moe, "")))


@pytest.mark.gpu
@pytest.mark.parametrize("router", ROUTERS)
def test_inductor_equals_eager_in_evaluation_and_trains(tiny_config, router):
    config = config_with(tiny_config, router)
    models = [make_gpt(config, training=False).cuda() for _ in range(2)]
    torch._dynamo.reset()
    for block in models[1].blocks:
        block.compile(fullgraph=models[1].moe_layers[0].router.one_graph, dynamic=False)
    batch = [each.cuda() for each in make_batch(config)]
    losses = []
    for model in models:
        output = model(*batch)
        output.loss.backward()
        losses.append(output.loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm() + 1e-7, name
    models[1].train()
    output = models[1](*batch)
    router_contracts_loss = output.loss + sum(output.extra_losses.values())
    router_contracts_loss.backward()
    assert torch.isfinite(router_contracts_loss)
    assert output.stats.n_tokens_B.sum() == 2 * batch[0].shape[0] * L * config.moe.router.n_chunks

"""Every registered balancer keeps the contracts, with the first router that it accepts; a broken one is caught."""

from __future__ import annotations

from typing import Any

import balancer_contracts
import broken
import pytest
from balancer_contracts import CONTRACTS

from moelm.config import ConfigError, MoEConfig, build, from_dict, registered

ROUTERS: list[dict[str, Any]] = [
    {"name": "top_k", "normalize_gates": "after_top_k", "selection_bias": True},
    {"name": "top_k", "n_groups": 4, "top_k_groups": 2},
    {"name": "noisy_top_k"},
]


def config_for(balancer: str, **options: Any) -> MoEConfig:
    for router in ROUTERS:
        raw = {"n_experts": 8, "top_k": 2, "router": router, "balancers": [{"name": balancer, **options}]}
        moe = from_dict(MoEConfig, raw, "model.moe")
        try:
            moe.balancers[0].check("model.moe.balancers.0", moe)
        except ConfigError:
            continue
        return moe
    pytest.fail(f"no router of {ROUTERS} fits {balancer}")


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("balancer", sorted(registered("balancer")))
def test_every_balancer_keeps_the_contract(balancer, contract):
    moe = config_for(balancer)
    contract(build("balancer", moe.balancers[0]), moe)


@pytest.mark.parametrize(("fault", "contract"), broken.BALANCER_FAULTS.items())
def test_a_broken_balancer_breaks_the_contract(fault, contract):
    with broken.broken_things_registered():
        moe = config_for("broken", fault=fault)
        with pytest.raises(AssertionError):
            getattr(balancer_contracts, contract)(build("balancer", moe.balancers[0]), moe)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_the_broken_balancer_without_its_fault_keeps_every_contract(contract):
    with broken.broken_things_registered():
        moe = config_for("broken")
        contract(build("balancer", moe.balancers[0]), moe)

"""Balancers that a config may not combine: each refusal names the key, the problem and the remedy."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from test_balancing import LOSSES

from moelm.config import ConfigError, MoEConfig, RouterConfig, check_model, make_named, registered

GROUPS = {"name": "top_k", "n_groups": 4, "top_k_groups": 2}


@dataclass
class Fixed(RouterConfig):
    learned: ClassVar[bool] = False


@dataclass
class Even(RouterConfig):
    balanced: ClassVar[bool] = True
    provides: ClassVar[tuple[str, ...]] = ("smooth_load_BE",)
    n_groups: int = 4


@dataclass
class Noisy(RouterConfig):
    provides: ClassVar[tuple[str, ...]] = ("smooth_load_BE",)


def refusal(router, *names):
    """The message of the first balancer that refuses to stand beside the others and this router; None if all agree."""
    moe = MoEConfig(router=router, balancers=[make_named("balancer", name) for name in names])
    for i, balancer in enumerate(moe.balancers):
        try:
            balancer.check(f"model.moe.balancers.{i}", moe)
        except ConfigError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_refused_where_no_weight_could_follow_it(name):
    message = refusal(Fixed("fixed"), name)
    assert message.startswith("model.moe.balancers.0: ")
    assert f"fixed has no weights that {name} could move" in message
    assert "remedy: set model.moe.balancers=[none]" in message
    assert refusal(Fixed("fixed"), "none") is None


@pytest.mark.parametrize("name", LOSSES)
def test_a_balancing_loss_is_refused_where_the_router_balances_by_itself(name):
    message = refusal(Even("even"), name)
    if name == "z_loss":  # it does not balance
        assert message is None
    else:
        assert message.startswith("model.moe.balancers.0: ")
        assert f"even loads experts evenly by construction, so {name} has no effect" in message
        assert "model.moe.balancers=[none]" in message


@pytest.mark.parametrize("name", ["device", "communication"])
def test_group_losses_need_groups(tiny_config, name):
    with pytest.raises(ConfigError, match="n_groups") as raised:
        tiny_config(moe={"balancers": [name]})
    assert str(raised.value).startswith(f"model.moe.balancers.0: {name} balances groups of experts")
    assert "remedy: set model.moe.router.n_groups" in str(raised.value)
    tiny_config(moe={"balancers": [name], "router": GROUPS})


def test_load_needs_a_router_that_gives_a_smooth_load(tiny_config):
    with pytest.raises(ConfigError, match="noise") as raised:
        tiny_config(moe={"balancers": ["switch", "load"]})
    assert str(raised.value).startswith("model.moe.balancers.1: load needs the expected load")
    assert "remedy: use the router noisy_top_k" in str(raised.value)
    assert refusal(Noisy("noisy"), "importance", "load") is None


def test_none_stands_alone(tiny_config):
    for names, place in ((["none", "switch"], 0), (["z_loss", "none"], 1)):
        with pytest.raises(ConfigError, match="none contradicts") as raised:
            tiny_config(moe={"balancers": names})
        assert str(raised.value).startswith(f"model.moe.balancers.{place}: none contradicts {names[1 - place]}")
        assert "remedy: remove one" in str(raised.value)
    tiny_config(moe={"balancers": ["none"]})


def test_loss_free_needs_a_router_that_uses_the_bias(tiny_config):
    with pytest.raises(ConfigError, match="selection_bias=true"):
        tiny_config(moe={"balancers": ["loss_free"]})
    with pytest.raises(ConfigError, match=r"'hash' does not use\n  remedy: remove it"):
        tiny_config(moe={"router": "hash", "balancers": ["loss_free"]})


def test_settings_outside_their_limits_are_refused(tiny_config):
    router = {"name": "top_k", "selection_bias": True}
    for key, value in (("rule", "cubic"), ("stop_step", 0), ("rate", 0)):
        with pytest.raises(ConfigError, match=rf"model\.moe\.balancers\.0\.{key}"):
            tiny_config(moe={"router": router, "balancers": [{"name": "loss_free", key: value}]})
    tiny_config(moe={"router": router, "balancers": [{"name": "loss_free", "rule": "proportional", "stop_step": 9}]})


@pytest.mark.parametrize("name", LOSSES)
def test_a_coefficient_of_zero_is_allowed_and_a_negative_one_is_not(tiny_config, name):
    config = tiny_config(moe={"router": GROUPS})
    config.moe.router = config.moe.router if name != "load" else Noisy("noisy")
    config.moe.balancers = [registered("balancer")[name](name=name, coef=0.0)]
    check_model(config)
    with pytest.raises(ConfigError, match=r"model\.moe\.balancers\.0\.coef"):
        tiny_config(moe={"router": GROUPS, "balancers": [{"name": name, "coef": -1}]})


def test_a_centring_without_effect_is_refused(tiny_config):
    router = {"name": "top_k", "selection_bias": True}
    rule = {"name": "loss_free", "rule": "proportional"}
    tiny_config(moe={"router": router, "balancers": [rule]})
    with pytest.raises(ConfigError, match=r"balancers\.0\.centred: false has no effect"):
        tiny_config(moe={"router": router, "balancers": [{**rule, "centred": False}]})

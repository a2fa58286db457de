"""Where two model configs compute different things once trained, whatever they say of training."""

from __future__ import annotations

from typing import Any

from moelm.config import ModelConfig, MoEConfig, differences, to_dict
from moelm.hub.reading import show

TRAINING_ONLY = ("init", "dropout", "multi_token_prediction")


def differences_in_effect(ours: ModelConfig, theirs: ModelConfig, owner: str) -> list[str]:
    """One sentence for each setting of `ours` that a trained model of `theirs`, called `owner`, does not have."""
    a, b = _essence(ours), _essence(theirs)
    a["attention"], b["attention"] = _by_layer(ours, theirs)
    if a["moe"] is None or b["moe"] is None:
        a["moe"], b["moe"] = (None if each["moe"] is None else "a mixture of experts" for each in (a, b))
    else:
        for part in ("router", "dispatch"):
            a["moe"][part], b["moe"][part] = _comparable(a["moe"][part], b["moe"][part])
    found = differences({"model": a}, {"model": b})
    return [f"{key} is {show(mine)}, {owner} has {show(other)}" for key, (mine, other) in found.items()]


def _essence(config: ModelConfig) -> dict[str, Any]:
    """What a trained model computes in evaluation, equal spellings made one."""
    raw = to_dict(config)
    for key in TRAINING_ONLY:
        raw.pop(key, None)
    if config.moe is not None:
        raw["moe"] = _moe_essence(config.moe)
        if len(config.moe_layers) == 1:
            raw["moe"]["moe_every_n_layers"] = 1
        if len(config.moe_layers) == config.n_layers:
            raw["feed_forward"]["d_ff"] = None  # no dense layer
    return raw


def _moe_essence(moe: MoEConfig) -> dict[str, Any]:
    raw = to_dict(moe)
    del raw["balancers"], raw["experts"]["backend"], raw["n_shared_experts"]
    raw["d_shared"] = moe.shared_width
    router, dispatch = raw["router"], raw["dispatch"]
    router.pop("jitter", None)
    if "n_groups" in router and router["n_groups"] == router["top_k_groups"]:  # every group is among the best
        router |= {"n_groups": 1, "top_k_groups": 1}
    if router.get("n_groups") == 1:
        router["group_score"] = None
    if dispatch["name"] == "capacity" and dispatch["eval_dispatch"] == "dropless":
        raw["dispatch"] = {"name": "dropless"}
    return raw


def _by_layer(ours: ModelConfig, theirs: ModelConfig) -> tuple[Any, Any]:
    """The attentions of both, as one section each if all layers have the same, else as lists of those that recur."""
    layers = range(min(ours.n_layers, theirs.n_layers))
    pairs = [_comparable(_attention_essence(ours, i), _attention_essence(theirs, i)) for i in layers]
    period = next(n for n in range(1, len(pairs) + 1) if all(pair == pairs[i % n] for i, pair in enumerate(pairs)))
    if period == 1:
        return pairs[0]
    return [pair[0] for pair in pairs[:period]], [pair[1] for pair in pairs[:period]]


def _attention_essence(config: ModelConfig, layer: int) -> dict[str, Any]:
    attention: Any = config.attention_of(layer)
    raw = to_dict(attention)
    if attention.name == "gqa":
        raw |= {"n_kv_heads": attention.kv_heads, "head_dim": attention.width(config.d_model)}
    return raw


def _comparable(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of sections with different names the names alone, since the rest of one means nothing to the other."""
    return (a, b) if a["name"] == b["name"] else ({"name": a["name"]}, {"name": b["name"]})

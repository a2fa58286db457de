"""The seam of the architectures: what each of transformers' models must say of itself, and what they share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import moelm.model.attention
import moelm.moe.balancing
import moelm.moe.dispatch
import moelm.moe.routing  # noqa: F401  the four fill the registry, which configs are read with
from moelm.config import ConfigError, ModelConfig, MoEConfig, check_model, from_dict, make_named
from moelm.hub.comparison import differences_in_effect
from moelm.hub.reading import HubError, Reading, make_config, transformers
from moelm.hub.weights import Weight, experts_apart, experts_together, same, side_by_side


class Architecture:
    """One model of transformers. A subclass says how its config reads (`read`) and writes (`write`), and what the
    tensors of one layer are called (`layer_weights`)."""

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    attention: ClassVar[str] = "gqa"  # the attention that it has
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    final_norm: ClassVar[str] = "model.norm.weight"
    head: ClassVar[str] = "lm_head.weight"
    layer_prefix: ClassVar[str] = "model.layers."

    def read(self, hf: Reading) -> dict[str, Any]:
        """Their config -> a ModelConfig as YAML would give it. What cannot be expressed goes to `hf.reasons`."""
        raise NotImplementedError

    def write(self, config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """Their config closest to ours, whose attentions and router are of the right name; `moe` is `config.moe`. What
        has no place in it is left out: `write_config` finds that out."""
        raise NotImplementedError

    def layer_weights(self, config: ModelConfig, layer: int, ours: str, theirs: str, fused: bool) -> Iterator[Weight]:
        """The tensors of one layer; `ours` and `theirs` are what their names begin with."""
        raise NotImplementedError

    @property
    def config_class(self) -> Any:
        return transformers("models.auto.configuration_auto").CONFIG_MAPPING[self.model_type]

    @property
    def length_key(self) -> str:
        """What a config.json calls the number of tokens of the longest text."""
        name = "max_position_embeddings"
        return str(self.config_class.attribute_map.get(name, name))

    def longest_text(self, hf: dict[str, Any]) -> int | None:
        """What a config.json, or the default of its class, says it is."""
        length: int | None = getattr(make_config(self.config_class, hf), self.length_key)
        return length

    def read_config(self, hf: dict[str, Any]) -> ModelConfig:
        """The config.json -> ours; keys that it lacks have the default of transformers' class.

        Raises HubError with all reasons: a key that is not understood, a value that we cannot express.
        """
        config, reasons = self._read(hf)
        if config is None or reasons:
            raise HubError(f"this {self.model_type} cannot be read", reasons)
        return config

    def _read(self, hf: dict[str, Any]) -> tuple[ModelConfig | None, list[str]]:
        """The config, as far as it can be read, and all reasons why not."""
        config_class = self.config_class
        try:
            reading = Reading(make_config(config_class, hf), hf)
        except HubError as error:
            return None, error.reasons
        try:
            if reading["num_hidden_layers"] < 1:
                return None, [f"num_hidden_layers is {reading['num_hidden_layers']}, allowed: at least 1"]
            raw = self.read(reading)
        except (TypeError, ArithmeticError) as error:  # arithmetic with a null or a 0 that the class lets pass
            return None, [*reading.reasons, f"its values do not make a model: {error}"]
        reasons, config = reading.finish(), None
        try:
            config = from_dict(ModelConfig, raw, "model")
            check_model(config)
        except ConfigError as error:
            reasons.append(" ".join(str(error).split()))
        return config, reasons

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """A complete config.json of a model that computes the same.

        Raises HubError with all reasons why there is none.
        """
        closest = self._closest(config)
        assert closest.moe is not None
        hf = {"model_type": self.model_type, "architectures": [self.class_name], **self.write(closest, closest.moe)}
        rope = hf["rope_parameters"]
        if "factor" in rope:  # without the length that it stretches to, transformers warns of the class's default
            hf[self.length_key] = int(rope["original_max_position_embeddings"] * rope["factor"])
        back, reasons = self._read(hf)
        reasons = [*differences_in_effect(config, back or closest, self.model_type), *reasons]
        if reasons:
            raise HubError(f"{self.model_type} cannot express this model", reasons)
        return hf

    def _closest(self, config: ModelConfig) -> ModelConfig:
        """`config` with attentions and router of the name that the architecture has, so that `write` can read them."""
        attentions = [each if each.name == self.attention else _smallest(self.attention) for each in config.attentions]
        moe = config.moe
        if moe is None:
            moe = MoEConfig(n_experts=4, top_k=2, balancers=[])
        if moe.router.name != "top_k":
            moe = dataclasses.replace(moe, router=from_dict(MoEConfig, {"router": "top_k"}).router)
        return dataclasses.replace(config, attention=attentions, moe=moe)

    def weights(self, config: ModelConfig, fused: bool) -> Iterator[Weight]:
        """Every tensor of the model once: embedding, layer by layer, final norm, head.

        `fused`: the experts of a layer in two tensors, as modules of transformers 5 have them, or else in a tensor
        for each expert and matrix, as published files do. Some architectures know only one layout.
        """
        yield same("embedding.weight", self.embedding)
        for layer in range(config.n_layers):
            prefixes = f"blocks.{layer}.", f"{self.layer_prefix}{layer}."
            yield from self.layer_weights(config, layer, *prefixes, fused)
        yield same("norm.weight", self.final_norm)
        if not config.tied_embeddings:
            yield same("head.weight", self.head)

    def is_fused(self, names: set[str], config: ModelConfig) -> bool:
        """Which layout a set of their tensors has: the one of whose names fewer are missing."""

        def n_missing(fused: bool) -> int:
            return sum(name not in names for weight in self.weights(config, fused) for name in weight.theirs)

        return n_missing(True) < n_missing(False)

    def n_prediction_layers(self, hf: dict[str, Any]) -> int:
        """How many layers of multi-token prediction their files have after the last one of the model."""
        return 0

    def ignored(self, name: str, config: ModelConfig, n_prediction_layers: int = 0) -> bool:
        """Whether one of their tensors is none of the model: a layer of multi-token prediction, a second copy of a tied
        table, the frequencies of RoPE that old files hold."""
        layer = re.match(rf"{re.escape(self.layer_prefix)}(\d+)\.", name)
        predicts = layer is not None and 0 <= int(layer[1]) - config.n_layers < n_prediction_layers
        return predicts or name.endswith(".inv_freq") or (config.tied_embeddings and name == self.head)

    def left_out(self, name: str) -> bool:
        """Whether one of our tensors serves training alone and has no place in their model."""
        return name.startswith("multi_token_prediction.")


def _smallest(attention: str) -> Any:
    """A section that is valid in any model."""
    section: Any = make_named("attention", attention)
    section.n_heads = 1
    if attention == "gqa":
        section.head_dim = 2
    return section


# ------------------------------------------------------------------- what architectures that descend from Llama share


def read_sizes(hf: Reading) -> dict[str, Any]:
    """The part of a ModelConfig that is neither attention nor feed-forward."""
    hf.only("hidden_act", "silu")
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": hf["hidden_size"],
        "vocab_size": hf["vocab_size"],
        "norm": "rmsnorm",
        "norm_eps": hf["rms_norm_eps"],
        "tied_embeddings": hf["tie_word_embeddings"],
        "init": {"std": hf["initializer_range"], "scale_residual": False},
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init.std,
        **no_special_tokens(),
    }


def no_special_tokens() -> dict[str, Any]:
    """None: which they are is the tokenizer's affair, and a default of the class may lie past the vocabulary."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def read_heads(hf: Reading) -> dict[str, Any]:
    hf.only("attention_dropout", 0.0, None)
    return {"n_heads": hf["num_attention_heads"], "n_kv_heads": hf["num_key_value_heads"]}


def read_head_dim(hf: Reading) -> dict[str, Any]:
    return {"head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]}


def write_heads(attention: Any) -> dict[str, Any]:
    return {"num_attention_heads": attention.n_heads, "num_key_value_heads": attention.kv_heads}


def read_switch(hf: Reading, key: str = "router_aux_loss_coef") -> list[dict[str, Any]]:
    """The balancers: none, or `switch`. Its value is that of each layer alone and 1 at balance, as in MegaBlocks and
    Megatron; transformers' own pools the layers and gives top_k, so that the same coefficient weighs more there."""
    coef = hf[key]
    return [{"name": "switch", "coef": coef}] if coef else []


def read_softmax_router(hf: Reading) -> dict[str, Any]:
    return {"name": "top_k", "normalize_gates": "after_top_k" if hf["norm_topk_prob"] else "none"}


def write_softmax_router(moe: MoEConfig) -> dict[str, Any]:
    router: Any = moe.router
    return {
        "norm_topk_prob": router.normalize_gates == "after_top_k",
        "router_aux_loss_coef": write_coef(moe, "switch", "global_batch"),
    }


def write_coef(moe: MoEConfig, *balancers: str) -> float:
    """The coefficient of the first of these balancers that the model has; 0 without."""
    coefs: list[float] = [getattr(each, "coef", 0.0) for each in moe.balancers if each.name in balancers]
    return coefs[0] if coefs else 0.0


def write_summed_coef(config: ModelConfig, *balancers: str) -> float:
    """The same where the other side adds the losses of the MoE layers up."""
    assert config.moe is not None
    summed = [getattr(each, "over_layers", "") == "sum" for each in config.moe.balancers if each.name in balancers]
    coef = write_coef(config.moe, *balancers)
    return coef if not summed or summed[0] else coef / len(config.moe_layers)


def read_layer_types(hf: Reading, section: dict[str, Any]) -> Any:
    """The attention, with a sliding window in the layers that `layer_types` says: one section or a list of those that
    recur."""
    windows = {"sliding_attention": hf["sliding_window"] or None, "full_attention": None}
    types = hf["layer_types"]
    if len(types) != hf["num_hidden_layers"] or not set(types) <= set(windows):
        hf.refuse("layer_types", types, f"{' or '.join(windows)} for each layer")
        return section
    period = next(n for n in range(1, len(types) + 1) if all(kind == types[i % n] for i, kind in enumerate(types)))
    sections = [section | {"sliding_window": windows[kind]} for kind in types[:period]]
    return sections[0] if period == 1 else sections


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    attentions: list[Any] = [config.attention_of(layer) for layer in range(config.n_layers)]
    windows = [each.sliding_window for each in attentions]
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


def gqa_weights(attention: Any, ours: str, theirs: str) -> Iterator[Weight]:
    """`ours` and `theirs` are what the names begin with, up to the module of the attention."""
    for name, their_name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
        yield same(f"{ours}.{name}.weight", f"{theirs}.{their_name}.weight")
        if attention.out_bias if name == "out" else attention.qkv_bias:
            yield same(f"{ours}.{name}.bias", f"{theirs}.{their_name}.bias")
    if attention.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            yield same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
    if attention.sinks:
        yield same(f"{ours}.sinks", f"{theirs}.sinks")


def norm_weights(ours: str, theirs: str) -> Iterator[Weight]:
    yield same(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight")
    yield same(f"{ours}feed_forward_norm.weight", f"{theirs}post_attention_layernorm.weight")


def swiglu_weights(ours: str, theirs: str) -> Iterator[Weight]:
    """A dense or shared feed-forward."""
    yield side_by_side(f"{ours}.gate_up.weight", f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    yield same(f"{ours}.down.weight", f"{theirs}.down_proj.weight")


def experts_weights(ours: str, theirs: str, n_experts: int, fused: bool) -> Iterator[Weight]:
    if fused:
        yield from experts_together(ours, theirs)
    else:
        yield from experts_apart(ours, theirs, n_experts, "gate_proj", "up_proj", "down_proj")

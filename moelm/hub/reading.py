"""A config.json of transformers, read strictly: every key is understood, or it is an error that names it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

from moelm.config import UserError

# Keys that change nothing of what we compute from the weights.
HARMLESS = {
    *("model_type", "architectures", "auto_map", "transformers_version", "name_or_path", "_name_or_path"),
    *("torch_dtype", "dtype", "use_cache", "max_position_embeddings", "max_seq_len", "pretraining_tp", "ep_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
    *("is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type"),
    *("attn_implementation", "experts_implementation", "_attn_implementation_autoset"),
}


OLDEST = (5, 23)  # the version of transformers that is tested
SHOWN = 40  # reasons in a message: a folder with the wrong tensors has thousands


class HubError(UserError):
    """A model that one side has and the other cannot express, with all the reasons."""

    def __init__(self, problem: str, reasons: list[str]) -> None:
        self.reasons = reasons
        shown, n_more = reasons[:SHOWN], len(reasons) - SHOWN
        lines = [f"  - {reason}" for reason in shown] + [f"  and {n_more} more"] * (n_more > 0)
        super().__init__("\n".join([problem, *lines]))


def transformers(module: str = "") -> Any:
    """The package, or a module of it, imported when it is needed. Raises HubError where it is not installed."""
    try:
        package = importlib.import_module("transformers")
        if tuple(map(int, package.__version__.split(".")[:2])) < OLDEST:  # configs of before lack keys, or take others
            raise HubError(f"transformers {package.__version__} is too old", ["pip install --upgrade moelm[hub]"])
        return importlib.import_module(f"transformers.{module}") if module else package
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise HubError("transformers is not installed", ["pip install moelm[hub]"]) from None


class Reading:
    """A config.json as transformers understands it (defaults, old and new spellings of a key), which remembers what
    was asked of it, so that keys nobody asked for can be refused.

    `reasons` collects what cannot be expressed; reading goes on, so that all of them are found.
    """

    def __init__(self, config: Any, given: dict[str, Any], where: str = "") -> None:
        """`config`: the object that transformers makes of the mapping `given`; `where` its keys stand."""
        self.config, self.where = config, where
        self.reasons: list[str] = []
        self._values = given
        self._canonical = dict(config.attribute_map)
        self._read: set[str] = set()
        self._sections: list[Reading] = []

    @property
    def given(self) -> set[str]:
        """The keys of the file, each in the spelling that the class prefers."""
        return {self._canonical.get(key, key) for key in self._values}

    def __getitem__(self, key: str) -> Any:
        """The value of a key that the class of transformers has."""
        self._read.add(self._canonical.get(key, key))
        return getattr(self.config, key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key that only some files have."""
        self._read.add(self._canonical.get(key, key))
        value = getattr(self.config, key, None)
        return default if value is None else value

    def only(self, key: str, *allowed: Any, remedy: str = "") -> None:
        """The key, if the file or the class has it, must have one of these values."""
        self._read.add(self._canonical.get(key, key))
        value = getattr(self.config, key, allowed[0])
        if value not in allowed:
            self.refuse(key, value, " or ".join(map(show, allowed)), remedy)

    def section(self, key: str) -> Reading:
        """A config within the config. Its reasons are among those of this one."""
        inner = Reading(self[key], self._values.get(key) or {}, f"{self.where}{key}.")
        inner.reasons = self.reasons
        self._sections.append(inner)
        return inner

    def refuse(self, key: str, value: Any, allowed: str, remedy: str = "") -> None:
        reason = f"{self.where}{key} is {show(value)}, allowed: {allowed}"
        self.reasons.append(f"{reason} ({remedy})" if remedy else reason)

    def finish(self) -> list[str]:
        """All reasons, with one for each key that was not asked for."""
        self.only("quantization_config", None, remedy="convert the weights to bf16 first")
        unknown = [
            f"{reading.where}{key} is a key that is not understood"
            for reading in (self, *self._sections)
            for key in sorted(reading.given - reading._read - HARMLESS)
        ]
        return [*self.reasons, *unknown]


def make_config(config_class: Any, hf: dict[str, Any]) -> Any:
    """Raises HubError if transformers itself refuses the values."""
    try:
        return config_class(**_with_floats(config_class, copy.deepcopy(hf)))
    except Exception as error:  # its validators raise errors of many kinds, all about the values
        raise HubError(f"{config_class.__name__} refuses the config", [" ".join(str(error).split())]) from None


def _with_floats(config_class: Any, hf: dict[str, Any]) -> dict[str, Any]:
    """1 as 1.0 where the class insists on a float: JSON does not tell them apart, and published files have both."""
    floats = {f.name for f in dataclasses.fields(config_class) if "float" in str(f.type) and "int" not in str(f.type)}
    sections = {key: section for key, section in config_class.sub_configs.items() if isinstance(hf.get(key), dict)}
    numbers = {key: float(value) for key, value in hf.items() if key in floats and type(value) is int}
    return hf | numbers | {key: _with_floats(section, hf[key]) for key, section in sections.items()}


def show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_rope(hf: Reading) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of an attention section, from `rope_parameters` (transformers 5) or from
    `rope_theta` and `rope_scaling` (before), which the class has already made one."""
    for key in ("rope_theta", "rope_scaling"):
        hf.get(key)
    hf.only("partial_rotary_factor", 1.0)
    rope = dict(hf["rope_parameters"])
    kind = rope.pop("rope_type", None)
    theta = rope.pop("rope_theta", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        hf.refuse("rope_parameters.partial_rotary_factor", hf["rope_parameters"]["partial_rotary_factor"], "1.0")
    rope.pop("type", None)  # the old name of rope_type
    names = ROPE_NAMES.get(kind)
    if names is None:
        hf.refuse("rope_parameters.rope_type", kind, " or ".join(map(repr, ROPE_NAMES)))
        return {"rope_theta": theta}
    scaling = {"kind": "none" if kind == "default" else kind}
    for key, value in rope.items():
        if key in names:
            scaling |= {} if value is None else {names[key]: value}
        elif value is not None:
            hf.reasons.append(f"rope_parameters.{key} is a key that is not understood")
    return {"rope_theta": theta, "rope_scaling": scaling}


ROPE_NAMES: dict[str, dict[str, str]] = {  # rope_type -> their key -> ours
    "default": {},
    "yarn": {
        **{"factor": "factor", "original_max_position_embeddings": "original_context", "truncate": "truncate"},
        **{"beta_fast": "beta_fast", "beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"},
    },
    "llama3": {
        **{"factor": "factor", "original_max_position_embeddings": "original_context"},
        **{"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"},
    },
}


def write_rope(attention: Any) -> dict[str, Any]:
    """The `rope_parameters` of an attention section."""
    scaling = attention.rope_scaling
    kind = "default" if scaling.kind == "none" else scaling.kind
    values = {theirs: getattr(scaling, ours) for theirs, ours in ROPE_NAMES[kind].items()}
    given = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": kind, "rope_theta": attention.rope_theta, **given}

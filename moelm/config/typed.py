"""Plain containers, as YAML gives them, to dataclasses and back; strict: unknown keys, wrong types and values out of
range are errors."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import typing
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moelm.config.errors import ConfigError, did_you_mean, join, show
from moelm.config.registry import NamedConfig, allowed_names, registered
from moelm.config.sections import MANAGED_TRAINER_ARGUMENTS, REQUIRED, TrainerConfig

C = TypeVar("C")


def from_dict(cls: type[C], raw: Any, key: str = "") -> C:
    """A plain mapping -> `cls`, strictly: unknown keys, wrong types and values out of range are errors."""
    assert is_dataclass(cls)
    known = {f.name: f for f in fields(cls) if not (f.name == "name" and issubclass(cls, NamedConfig))}
    listed = ", ".join(known) or "none"
    if not isinstance(raw, dict):
        raise ConfigError(key or "config", f"{show(raw)} is not a mapping", f"give its keys, of: {listed}")
    try:
        if not key:
            raw = OmegaConf.to_container(OmegaConf.create(raw), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or "config"))
        remedy = "${...} is a key that the YAML sets, such as ${model.d_model}; ??? is a value to fill in"
        raise ConfigError(where, str(error).splitlines()[0], remedy) from None
    for name in raw:
        if cls is TrainerConfig and name in MANAGED_TRAINER_ARGUMENTS:
            raise ConfigError(join(key, name), "is managed by moelm", MANAGED_TRAINER_ARGUMENTS[name])
        if name not in known:
            elsewhere = [section for section in known if name in _keys_of(cls, section)] if not key else []
            hint = f"did you mean {elsewhere[0]}.{name}? " if elsewhere else did_you_mean(name, known)
            raise ConfigError(join(key, name), "unknown key", f"{hint}allowed: {listed}")
    for name, f in known.items():
        if name not in raw and f.default is f.default_factory is REQUIRED:
            raise ConfigError(join(key, name), "is missing", f"give all of: {listed}")
    hints = typing.get_type_hints(cls)
    values = {name: _from_value(hints[name], known[name], value, join(key, name)) for name, value in raw.items()}
    return typing.cast(C, cls(**values))


def _keys_of(cls: type[Any], section: str) -> list[str]:
    hint = typing.get_type_hints(cls)[section]
    return [f.name for f in fields(hint)] if is_dataclass(hint) else []


def _from_value(hint: Any, f: dataclasses.Field[Any], value: Any, key: str) -> Any:
    if "registry" in f.metadata:
        kind = f.metadata["registry"]
        may_be_list = "list" in str(hint)
        if not may_be_list or (typing.get_origin(hint) is not list and not isinstance(value, list)):
            return _from_named(kind, value, key)
        if not isinstance(value, list):
            remedy = f"list them: [{{name: ...}}]; {allowed_names(kind)}"
            raise ConfigError(key, f"{show(value)} is not a list", remedy)
        return [_from_named(kind, element, f"{key}.{i}") for i, element in enumerate(value)]
    options = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    section = next((option for option in options if is_dataclass(option)), None)
    element = next((each for option in options for each in typing.get_args(option) if is_dataclass(each)), None)
    if (section or element) is not None and value is None and NoneType in options:
        return None
    if element is not None and isinstance(value, list):
        return [from_dict(typing.cast(type[Any], element), each, f"{key}.{i}") for i, each in enumerate(value)]
    if section is not None:
        if not isinstance(value, dict) and NoneType in options:
            listed = ", ".join(each.name for each in fields(section))
            raise ConfigError(key, f"{show(value)} is not a mapping", f"give null, or its keys, of: {listed}")
        return from_dict(typing.cast(type[Any], section), value, key)
    if element is not None:
        listed = ", ".join(f"{each.name}: ..." for each in fields(element))
        raise ConfigError(key, f"{show(value)} is not a list", f"list them: [{{{listed}}}]")
    if not isinstance(value, str):  # "2" is an int before it is text, but 1.0 a float before it is an int
        options = tuple(sorted(options, key=lambda option: type(value) is not option))
    for option in options:
        try:
            converted = _convert(option, value)
        except (ValueError, OverflowError):
            continue
        _check_limits(f.metadata, converted, key)
        return converted
    if "allowed" in f.metadata:
        _check_limits(f.metadata, value, key)
    wanted = " or ".join(map(_type_name, options))
    raise ConfigError(key, f"{show(value)} is not {wanted}", f"give {wanted}")


def _from_named(kind: str, value: Any, key: str) -> NamedConfig:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigError(key, f"{show(value)} has no `name`", f"write {{name: ...}}; {allowed_names(kind)}")
    name, known = value["name"], registered(kind)
    if not isinstance(name, str) or name not in known:
        problem = f"{show(name)} is not a known {kind}"
        remedy = f"{did_you_mean(name, known)}{allowed_names(kind)}; or name the module that registers it with --plugin"
        raise ConfigError(f"{key}.name", problem, remedy)
    config = from_dict(known[name], {k: v for k, v in value.items() if k != "name"}, key)
    config.name = name
    return config


def _convert(wanted: Any, value: Any) -> Any:
    """3, '3' and 3.0 -> int, but never 3.5, 'lots' or True -> int. Raises ValueError or OverflowError."""
    if wanted is Any:
        return value
    if typing.get_origin(wanted) is list and isinstance(value, list):
        return [_convert(typing.get_args(wanted)[0], element) for element in value]
    if wanted in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = wanted(value)
        if math.isfinite(number) and (isinstance(value, str) or number == value):
            return number
    elif wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    elif wanted is str and type(value) is int:
        return str(value)
    elif type(value) is wanted and not (wanted is str and ("\0" in value or "${" in value)):
        return value
    raise ValueError


def _type_name(wanted: Any) -> str:
    if typing.get_origin(wanted) is list:
        return f"a list, each element {_type_name(typing.get_args(wanted)[0])}"
    return _TYPE_NAMES.get(wanted, str(wanted))


_TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # functions of the module operator
_REFUSED = {
    ("trainer.precision", "bf16-true"): "it casts the expert bias and the master weights to bf16, where small"
    " updates are lost; use bf16-mixed; ",
    ("trainer.precision", "16-mixed"): "fp16 needs loss scaling, which skips steps; use bf16-mixed; ",
    ("trainer.strategy", "fsdp_cpu_offload"): "FSDP1 is not offered; fsdp is FSDP2; ",
    ("trainer.strategy", "fsdp1"): "FSDP1 is not offered; fsdp is FSDP2; ",
}


def _check_limits(limits: typing.Mapping[str, Any], value: Any, key: str) -> None:
    for element in value if isinstance(value, list) else [value]:
        allowed = limits.get("allowed", [element])
        if not any(element == a and type(element) is type(a) for a in allowed):
            shown = [a if isinstance(a, str) else show(a) for a in allowed]
            reason = _REFUSED.get((key, str(element)), did_you_mean(element, shown))
            raise ConfigError(key, f"{show(element)} is not allowed", f"{reason}allowed: {', '.join(shown)}")
        if element is None:
            continue
        pattern, meaning = limits.get("is_a", ("", ""))
        if pattern and not re.fullmatch(pattern, element):
            raise ConfigError(key, f"{show(element)} is not allowed", f"give {meaning}")
        bounds = {"lt": 2**63, **limits} if isinstance(element, int | float) else {}
        for limit, sign in _LIMITS.items():
            if limit in bounds and not getattr(operator, limit)(element, bounds[limit]):
                problem = f"{show(element)} is out of range"
                raise ConfigError(key, problem, f"it must be {sign} {bounds[limit]}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain containers; `from_dict(type(config), to_dict(config))` is the same config again."""
    return dataclasses.asdict(config)


def differences(a: Any, b: Any, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> the two values, where two plain trees differ. `ignore`: keys that may."""

    def flatten(tree: Any, key: str = "") -> dict[str, Any]:
        if isinstance(tree, list):
            tree = dict(enumerate(tree))
        if not isinstance(tree, dict) or not tree:
            return {key: tree}
        return {k: v for name, branch in tree.items() for k, v in flatten(branch, join(key, str(name))).items()}

    left, right = flatten(a), flatten(b)
    keys = sorted((left.keys() | right.keys()) - set(ignore))
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))

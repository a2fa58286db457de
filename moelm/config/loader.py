"""The strict loader: a file, what it extends and the overrides of the command line become a checked Config."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moelm.config.checks import check, check_corpus
from moelm.config.errors import ConfigError, join, reason, show
from moelm.config.registry import is_registered
from moelm.config.sections import Config, CorpusConfig
from moelm.config.typed import from_dict

MOST_CHARACTERS = 10**6
_UNPARSABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError)


def load_config(file: str | Path, overrides: Iterable[str] = ()) -> Config:
    """What the file `extends`, the file, then `key=value` overrides; strict, with all cross-field checks.

    Raises ConfigError; touches no device and no data.
    """
    raw = _override(read_yaml(file), overrides)
    if "sources" in raw:
        remedy = f"give the config of a run, in which data.corpus={file} names it"
        raise ConfigError(str(file), "is a corpus, not the config of a run", remedy)
    run = raw.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = Path(file).stem if run.get("name") is None else run["name"]
        run["preset"] = Path(file).stem if run.get("preset") is None else run["preset"]
    config = from_dict(Config, raw)
    check(config)
    return config


def load_corpus(file: str | Path, overrides: Iterable[str] = ()) -> CorpusConfig:
    """The same for a `configs/data/*.yaml`, or the corpus of the config of a run."""
    loaded = read_yaml(file)
    if _is_of_a_run(loaded):
        return load_config(file, overrides).data.corpus
    corpus = from_dict(CorpusConfig, {"name": Path(file).stem} | _override(loaded, overrides))
    check_corpus(corpus, "")
    return corpus


def _is_of_a_run(raw: dict[str, Any]) -> bool:
    return not {"model", "data", "optim", "trainer"}.isdisjoint(raw)


def read_yaml(file: str | Path, named_by: str = "", seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML with its parents (`extends`) and the corpus file it names merged in; still untyped.

    `named_by` is the key that named the file, `seen` the files that led to it.
    """
    return _read_over({}, [], file, named_by, seen)


def _read_over(
    under: dict[str, Any], applied: list[Path], file: str | Path, named_by: str, seen: tuple[Path, ...]
) -> dict[str, Any]:
    """The same over `under`. `applied` are the files in it: what two parents have in common comes once, first."""
    path = Path(file)
    where = f"{named_by}: {path}" if named_by else str(path)
    try:
        real = Path(os.path.realpath(path))  # unlike resolve, leaves it to `open` to refuse links that go in a circle
        if real in seen:
            raise ConfigError(where, "is part of itself", f"remove one `{named_by}`")
        if real in applied:
            return under
        with path.open(encoding="utf-8-sig") as stream:
            text = stream.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(where, f"has more than {MOST_CHARACTERS:,} characters", "name a YAML file with sections")
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except OSError as error:  # also what OmegaConf raises for a lone number
        missing = isinstance(error, FileNotFoundError)
        problem = "no such file" if missing else f"cannot be read: {error.strerror or error}"
        raise ConfigError(where, problem, "give the path of a YAML file with sections") from None
    except _UNPARSABLE as error:
        raise ConfigError(where, f"is not valid YAML: {reason(error)}", "correct it, or quote the value") from None
    if not isinstance(loaded, dict) or not loaded:
        problem = "is empty" if not loaded else "is not a mapping of sections"
        raise ConfigError(where, problem, "see configs/quickstart.yaml")
    raw = {str(key): value for key, value in loaded.items()}
    parents = raw.pop("extends", None) or []
    seen = (*seen, real)
    for parent in parents if isinstance(parents, list) else [parents]:
        if not isinstance(parent, str):
            raise ConfigError("extends", f"{show(parent)} is not a path", "name a YAML file, or a list of them")
        under = _read_over(under, applied, path.parent / parent, "extends", seen)
    applied.append(real)
    return _merge_file(under, raw, path.parent, seen)


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """What names another thing goes first, whatever the order: it replaces a section whole, and would take back what
    another override says of that."""
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].removesuffix(".name").count(".")):
        key = text.partition("=")[0]
        if "=" not in text or not re.fullmatch(r"\w+(\.\w+)*", key):
            remedy = "no spaces beside =, for example trainer.max_steps=100"
            raise ConfigError(text, "is not of the form key=value", remedy)
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except _UNPARSABLE as error:
            raise ConfigError(text, f"cannot be parsed: {reason(error)}", "quote the value") from None
        raw = _merge_file(raw, parsed, Path())
    return raw


def _merge_file(base: Any, change: Any, folder: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """`change` over `base`; the corpus file that it may name, relative to `folder`, replaces the corpus."""
    merged: dict[str, Any] = _merge(base, change)
    data = change.get("data")
    if isinstance(data, dict) and isinstance(data.get("corpus"), str):
        corpus = read_yaml(folder / data["corpus"], "data.corpus", seen)
        if _is_of_a_run(corpus):
            problem = f"{data['corpus']} is the config of a run, not a corpus"
            raise ConfigError("data.corpus", problem, "name a file such as configs/data/stdlib.yaml")
        merged["data"]["corpus"] = {"name": Path(data["corpus"]).stem} | corpus
    return merged


def _merge(base: Any, change: Any, key: str = "") -> Any:
    """`change` over `base`. A section that names another thing (`name`) replaces the old one whole, since the
    old one's fields mean nothing to it; the names of runs and corpora are only names, and all schedules warm up.
    `{0: ...}` changes an element of a list; a list replaces a list."""
    indices = isinstance(change, dict) and change and all(str(index).isdecimal() for index in change)
    if isinstance(base, list) and indices:
        merged = list(base)
        for index, value in change.items():
            if int(index) >= len(merged):
                raise ConfigError(join(key, index), f"the list has {len(merged)} elements", "count from 0")
            merged[int(index)] = _merge(merged[int(index)], value, join(key, index))
        return merged
    if isinstance(base, list) and isinstance(change, dict) and change and "name" not in change:
        remedy = f"number them, {join(f'{key}.0', next(iter(change)))} for the first, or give a whole list"
        raise ConfigError(key, f"is a list of {len(base)} here", remedy)
    is_a_name = key == "name" or key.endswith(".name")
    if isinstance(base, str) and not is_a_name and is_registered(base):
        base = {"name": base}  # `switch` is short for `{name: switch}`
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    only_a_name = key in ("", "run", "data.corpus") or "name" not in base or "name" not in change
    if not only_a_name and base["name"] != change["name"]:
        return change if key != "optim.schedule" else {k: base[k] for k in ("warmup_steps",) if k in base} | change
    return base | {
        name: _merge(base[name], value, join(key, name)) if name in base else value for name, value in change.items()
    }

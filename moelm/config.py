"""The whole YAML as typed dataclasses, and the strict loader that turns a file into them.

Reading order: the sections (`Config` at the end names them all), then the registry through which routers,
balancers, attentions, sources and callbacks bring a dataclass of their own, then `load_config`.

Every error is a `ConfigError` that names the key, the value, what is allowed and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(Exception):
    """Something the person at the terminal can put right. Commands print its message and exit with code 2."""


class ConfigError(UserError):
    def __init__(self, key: str, problem: str, remedy: str = "") -> None:
        self.key = key
        super().__init__(f"{key}: {problem}" + (f"\n  remedy: {remedy}" if remedy else ""))


# --------------------------------------------------------------------------------------------- registry


@dataclass
class NamedConfig:
    """The settings of one registered thing; `name` says which, and so which fields are allowed beside it."""

    name: str = ""

    def check(self, key: str, config: Any) -> None:
        """Cross-field checks. `key` is where this section stands (`model.moe.router`), `config` the enclosing
        section (`ModelConfig` for attention, `MoEConfig` for router, balancers and dispatch, else `Config`).

        Raises ConfigError.
        """


_registry: dict[str, dict[str, tuple[type[NamedConfig], Callable[..., Any]]]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def register(kind: str, name: str, config_class: type[NamedConfig]) -> Callable[[F], F]:
    """Decorate the class or function that builds `name` from its config; YAML can name it from then on."""

    def add(factory: F) -> F:
        known = _registry.setdefault(kind, {})
        if name in known and known[name][1] is not factory:
            raise ValueError(f"{kind} {name!r} is registered twice: {known[name][1]} and {factory}")
        known[name] = (config_class, factory)
        return factory

    return add


def registered(kind: str) -> dict[str, type[NamedConfig]]:
    """Name -> Config class of everything registered as `kind`."""
    return {name: config_class for name, (config_class, _) in sorted(_registry.get(kind, {}).items())}


def make_named(kind: str, name: str) -> NamedConfig:
    return registered(kind)[name](name=name)


def build(kind: str, config: NamedConfig, *args: Any, **kwargs: Any) -> Any:
    """Call the factory that is registered for `config.name` with `(config, *args, **kwargs)`."""
    return _registry[kind][config.name][1](config, *args, **kwargs)


# --------------------------------------------------------------------------------------------- sections


def setting(default: Any, **limits: Any) -> Any:
    """A field with limits: `allowed=(...)`, `ge`, `gt`, `le`, `lt`. Mutable defaults are copied."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=limits)
    return field(default=default, metadata=limits)


def named(kind: str, default: str) -> Any:
    """A field that holds one registered thing: `{name: top_k, ...}`."""
    return field(default_factory=lambda: make_named(kind, default), metadata={"registry": kind})


def named_list(kind: str, *defaults: str) -> Any:
    return field(
        default_factory=lambda: [make_named(kind, name) for name in defaults], metadata={"registry": kind}
    )


@dataclass
class RunConfig:
    name: str | None = None  # null: the file name of the config
    seed: int = setting(0, ge=0)
    dir: str = "checkpoints"


@dataclass
class FeedForwardConfig:
    d_ff: int = setting(512, ge=1)  # width of the dense layers
    activation: str = setting("swiglu", allowed=("swiglu",))


@dataclass
class ExpertsConfig:
    backend: str = setting("auto", allowed=("auto", "grouped", "loop"))  # auto: grouped where widths allow
    activation: str = setting("swiglu", allowed=("swiglu",))


@dataclass
class MoEConfig:
    n_experts: int = setting(8, ge=1)  # routed experts
    top_k: int = setting(2, ge=1)  # routed experts a token
    d_expert: int = setting(256, ge=1)
    n_shared_experts: int = setting(0, ge=0)
    d_shared: int | None = setting(None, ge=1)  # width of the fused shared FFN; null: n_shared * d_expert
    shared_gate: bool = False  # sigmoid(x . w) on the shared experts' output (Qwen)
    first_moe_layer: int = setting(0, ge=0)
    moe_every_n_layers: int = setting(1, ge=1)
    router: NamedConfig = named("router", "top_k")
    balancers: list[NamedConfig] = named_list("balancer", "switch")
    dispatch: NamedConfig = named("dispatch", "dropless")
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    @property
    def shared_width(self) -> int:
        """Width of the fused shared FFN; 0 without shared experts."""
        if self.n_shared_experts == 0:
            return 0
        return self.d_shared or self.n_shared_experts * self.d_expert


@dataclass
class InitConfig:
    std: float = setting(0.02, gt=0)
    truncate_sigmas: float | None = setting(None, gt=0)  # cut the normal distribution at this many sigmas
    scale_residual: bool = True  # std / sqrt(2 n_layers) for the matrices that write into the residual stream
    router_std: float | None = setting(None, gt=0)  # null: std


@dataclass
class ModelConfig:
    n_layers: int = setting(4, ge=1)
    d_model: int = setting(256, ge=1)
    vocab_size: int = setting(4096, ge=2)
    attention: NamedConfig = named("attention", "gqa")
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    moe: MoEConfig | None = field(default_factory=MoEConfig)  # null: every layer is dense
    norm_eps: float = setting(1e-5, gt=0)
    tied_embeddings: bool = True
    dropout: float = setting(0.0, ge=0, lt=1)  # on what attention and FFN add to the residual stream
    init: InitConfig = field(default_factory=InitConfig)

    def is_moe_layer(self, layer: int) -> bool:
        moe = self.moe
        return (
            moe is not None
            and layer >= moe.first_moe_layer
            and (layer - moe.first_moe_layer) % moe.moe_every_n_layers == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.n_layers) if self.is_moe_layer(layer)]


@dataclass
class TokenizerConfig:
    file: str | None = None  # an existing tokenizer.json; null: train a byte-level BPE on the corpus
    vocab_size: int = setting(4096, ge=257)  # 256 bytes, the end-of-text token, and merges
    train_bytes: int = setting(20_000_000, ge=1)  # how much of the corpus the training of the tokenizer reads
    end_of_text: str = "<|endoftext|>"


@dataclass
class CorpusConfig:
    """What `data_prep.prepare` turns into token shards: the content of a `configs/data/*.yaml`."""

    name: str = "stdlib"
    dir: str | None = None  # null: data/<name>
    sources: list[NamedConfig] = named_list("source", "stdlib")
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    val_fraction: float = setting(0.01, gt=0, lt=1)  # of the documents
    shard_tokens: int = setting(2**26, ge=1024)
    seed: int = setting(0, ge=0)  # of the split into training and validation

    @property
    def path(self) -> Path:
        return Path(self.dir or f"data/{self.name}")


@dataclass
class DataConfig:
    corpus: CorpusConfig = field(default_factory=CorpusConfig)  # inline, or the path of a configs/data/*.yaml
    seq_len: int = setting(256, ge=1)
    mask_documents: bool = False  # attention does not cross the end of a document
    val_every_n_steps: int = setting(200, ge=1)  # optimizer steps; the last step always validates
    n_workers: int = setting(0, ge=0)  # processes that read shards; reading is a memory map, 0 is fast


@dataclass
class ScheduleConfig:
    """Factor on `optim.lr`, by optimizer step; see docs/maths.md for the formulas."""

    name: str = setting("cosine", allowed=("constant", "linear", "cosine", "wsd", "step"))
    warmup_steps: int = setting(0, ge=0)
    min_lr_ratio: float = setting(0.1, ge=0, le=1)  # where linear, cosine and wsd end
    decay_steps: int | None = setting(None, ge=1)  # wsd: length of the final decay; null: a tenth of max_steps
    milestones: list[float] = setting([0.8, 0.9])  # step: fractions of max_steps
    factor: float = setting(0.316, gt=0, lt=1)  # step: lr is multiplied by it at each milestone


@dataclass
class OptimConfig:
    optimizer: str = setting("adamw", allowed=("adamw",))
    lr: float = setting(1e-3, gt=0)
    betas: list[float] = setting([0.9, 0.95])
    eps: float = setting(1e-8, gt=0)
    weight_decay: float = setting(0.1, ge=0)
    no_decay: list[str] = setting(["norm", "bias", "embedding"], allowed=("norm", "bias", "embedding"))
    batch_tokens: int = setting(16_384, ge=1)  # tokens an optimizer step, over all devices
    micro_batch_size: int = setting(8, ge=1)  # sequences on a device at a time; accumulation follows
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainerConfig:
    """Lightning's own Trainer arguments under their own names, and the ones that moelm takes out first.

    null means Lightning's default. What is missing here is in `MANAGED_TRAINER_ARGUMENTS`, with the reason.
    """

    max_steps: int = setting(1000, ge=1)
    accelerator: str = setting("auto", allowed=("auto", "cpu", "gpu", "cuda"))
    devices: Any = "auto"
    num_nodes: int = setting(1, ge=1)
    strategy: str = setting("auto", allowed=("auto", "ddp"))
    precision: str = setting("32-true", allowed=("32-true", "bf16-mixed"))
    gradient_clip_val: float | None = setting(1.0, gt=0)
    log_every_n_steps: int = setting(10, ge=1)
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    num_sanity_val_steps: int = setting(0, ge=0)
    max_time: Any = None
    fast_dev_run: Any = None
    overfit_batches: Any = None
    enable_progress_bar: bool = True
    deterministic: Any = None
    benchmark: bool | None = None
    detect_anomaly: bool | None = None
    profiler: str | None = setting(None, allowed=(None, "simple", "advanced"))
    # moelm's own
    activation_checkpointing: str = setting("none", allowed=("none", "full"))
    compile: Any = setting("auto", allowed=("auto", True, False))  # per block; auto: on CUDA only
    float32_matmul_precision: str = setting("highest", allowed=("highest", "high", "medium"))
    expert_parallel: int = setting(1, ge=1, le=1)
    profile: bool = setting(False, allowed=(False,))


OWN_TRAINER_KEYS = (
    "activation_checkpointing",
    "compile",
    "float32_matmul_precision",
    "expert_parallel",
    "profile",
)
MANAGED_TRAINER_ARGUMENTS = {
    "accumulate_grad_batches": "it follows from optim.batch_tokens and optim.micro_batch_size; set those",
    "max_epochs": "a run is measured in optimizer steps; set trainer.max_steps",
    "min_epochs": "a run is measured in optimizer steps; set trainer.max_steps",
    "min_steps": "a run ends at trainer.max_steps; set that",
    "val_check_interval": "validation is counted in optimizer steps; set data.val_every_n_steps",
    "check_val_every_n_epoch": "validation is counted in optimizer steps; set data.val_every_n_steps",
    "limit_test_batches": "there is no test loop; use python -m moelm.evaluate",
    "limit_predict_batches": "there is no predict loop; use python -m moelm.generate",
    "logger": "a run logs to TensorBoard in its own folder; set run.dir and run.name",
    "callbacks": "list them in the section `callbacks`",
    "default_root_dir": "a run has one folder; set run.dir and run.name",
    "enable_checkpointing": "set checkpoint.every_n_steps and checkpoint.keep_last",
    "enable_model_summary": "python -m moelm.info --config prints the parameter table",
    "gradient_clip_algorithm": "gradients are clipped by their global norm; set trainer.gradient_clip_val",
    "inference_mode": "validation always runs without gradients; remove the key",
    "use_distributed_sampler": "the order of samples is a function of run.seed and of the samples consumed",
    "reload_dataloaders_every_n_epochs": "there is one endless epoch; remove the key",
    "plugins": "moelm chooses them from strategy and precision; remove the key",
    "sync_batchnorm": "the model has no batch normalisation; remove the key",
    "barebones": "use `callbacks: []` and trainer.enable_progress_bar=false",
    "model_registry": "models are saved in the run's folder; remove the key",
    "enable_autolog_hparams": "the run card logs them; see the section `callbacks`",
}


@dataclass
class CheckpointConfig:
    every_n_steps: int = setting(200, ge=1)  # optimizer steps; the last step is always saved
    keep_last: int = setting(2, ge=1)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    callbacks: list[NamedConfig] = named_list("callback", "expert_usage", "balance", "throughput", "run_card")

    @property
    def run_name(self) -> str:
        return self.run.name or "run"

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run_name


# ----------------------------------------------------------------------------------------------- loader

C = TypeVar("C")


def load_config(file: str | Path, overrides: Iterable[str] = ()) -> Config:
    """File, its chain of `extends`, then `key=value` overrides; strict, with all cross-field checks.

    Raises ConfigError; touches no device and no data.
    """
    raw = read_yaml(file)
    raw.setdefault("run", {})
    if isinstance(raw["run"], dict) and raw["run"].get("name") is None:
        raw["run"]["name"] = Path(file).stem
    raw = _merge(raw, _parse_overrides(overrides))
    config = from_dict(Config, raw)
    check(config)
    return config


def load_corpus(file: str | Path, overrides: Iterable[str] = ()) -> CorpusConfig:
    """The same for a `configs/data/*.yaml`."""
    raw = _merge(read_yaml(file), _parse_overrides(overrides))
    raw.setdefault("name", Path(file).stem)
    corpus = from_dict(CorpusConfig, raw)
    check_corpus(corpus, "")
    return corpus


def read_yaml(file: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML with its parents (`extends`) and the corpus file it names merged in; still untyped."""
    path = Path(file)
    if path.resolve() in seen:
        raise ConfigError("extends", f"{path} extends itself", "remove one `extends`")
    try:
        loaded = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file", "give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(str(path), f"is not valid YAML: {problem}", "correct the line named") from None
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), "is not a mapping of sections", "see configs/quickstart.yaml")
    raw: dict[str, Any] = {str(key): value for key, value in loaded.items()}
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("corpus"), str):
        data["corpus"] = _read_corpus(data["corpus"], path.parent)
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise ConfigError("extends", f"{parent!r} is not a path", "name one YAML file")
    return _merge(read_yaml(path.parent / parent, (*seen, path.resolve())), raw)


def _read_corpus(file: str, folder: Path) -> dict[str, Any]:
    raw = read_yaml(folder / file)
    raw.setdefault("name", Path(file).stem)
    return raw


def _merge(base: Any, change: Any, key: str = "") -> Any:
    """`change` over `base`. A section that names another thing (`name`) replaces the old one whole, since the
    old one's fields mean nothing to it. `{0: ...}` changes an element of a list; a list replaces a list."""
    if isinstance(base, list) and isinstance(change, dict) and change and all(str(k).isdigit() for k in change):
        merged = list(base)
        for index, value in change.items():
            if int(index) >= len(merged):
                raise ConfigError(_join(key, index), f"the list has {len(merged)} elements", "count from 0")
            merged[int(index)] = _merge(merged[int(index)], value, _join(key, index))
        return merged
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    if key != "run" and "name" in base and "name" in change and base["name"] != change["name"]:
        return change
    return base | {
        name: _merge(base[name], value, _join(key, str(name))) if name in base else value
        for name, value in change.items()
    }


def _parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for text in overrides:
        if not re.match(r"^[\w.]+=", text):
            raise ConfigError(text, "is not of the form key=value", "for example trainer.max_steps=100")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(text, f"cannot be parsed: {' '.join(str(error).split())}") from None
        assert isinstance(parsed, dict)
        data = parsed.get("data")
        if isinstance(data, dict) and isinstance(data.get("corpus"), str):
            data["corpus"] = _read_corpus(data["corpus"], Path())
        merged = _merge(merged, parsed)
    return merged


def from_dict(cls: type[C], raw: Any, key: str = "") -> C:
    """A plain mapping -> `cls`, strictly: unknown keys, wrong types and values out of range are errors."""
    if not isinstance(raw, dict):
        raise ConfigError(key or "config", f"{raw!r} is not a mapping", f"give the fields of {cls.__name__}")
    try:
        raw = OmegaConf.to_container(OmegaConf.create(raw), resolve=True) if not key else raw
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or "config"), " ".join(str(error.msg).split())) from None
    assert is_dataclass(cls)
    known = {f.name: f for f in fields(cls) if not (f.name == "name" and issubclass(cls, NamedConfig))}
    for name in raw:
        if name not in known:
            raise _unknown_key(_join(key, str(name)), str(name), list(known), cls)
    hints = typing.get_type_hints(cls)
    values = {
        name: _from_value(hints[name], known[name], value, _join(key, name)) for name, value in raw.items()
    }
    return typing.cast(C, cls(**values))


def _from_value(hint: Any, f: dataclasses.Field[Any], value: Any, key: str) -> Any:
    if "registry" in f.metadata:
        kind = f.metadata["registry"]
        if typing.get_origin(hint) is not list:
            return _from_named(kind, value, key)
        if not isinstance(value, list):
            raise ConfigError(key, f"{value!r} is not a list", f"list them: [{{name: ...}}]; {_names(kind)}")
        return [_from_named(kind, element, f"{key}.{i}") for i, element in enumerate(value)]
    options = typing.get_args(hint) or (hint,)
    section = next((option for option in options if is_dataclass(option)), None)
    if section is not None:
        if value is None and NoneType in options:
            return None
        return from_dict(typing.cast(type[Any], section), value, key)
    converted = _convert(hint, value, key)
    _check_limits(f.metadata, converted, key)
    return converted


def _from_named(kind: str, value: Any, key: str) -> NamedConfig:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigError(key, f"{value!r} has no `name`", _names(kind))
    name, known = value["name"], registered(kind)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{key}.name", f"{name!r} is not a known {kind}", hint + _names(kind))
    config = from_dict(known[name], {k: v for k, v in value.items() if k != "name"}, key)
    config.name = name
    return config


def _names(kind: str) -> str:
    return f"allowed: {', '.join(registered(kind))}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """OmegaConf's typed conversion of one value: 3 or '3' -> int, but never 3.5 or 'lots' -> int."""
    if hint is Any:
        return value
    if typing.get_origin(hint) is list and isinstance(value, tuple):
        value = list(value)
    holder = OmegaConf.structured(dataclasses.make_dataclass("Holder", [("value", hint)]))
    try:
        holder.value = value
        return OmegaConf.to_container(holder)["value"]  # type: ignore[index,call-overload]
    except OmegaConfBaseException:
        wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        raise ConfigError(key, f"{value!r} is not of type {wanted}", f"give a value of type {wanted}") from None


def _check_limits(limits: typing.Mapping[str, Any], value: Any, key: str) -> None:
    allowed = limits.get("allowed")
    for element in value if isinstance(value, list) else [value]:
        if allowed is not None and not any(element == a and type(element) is type(a) for a in allowed):
            listed = ", ".join(map(str, allowed))
            close = difflib.get_close_matches(str(element), [str(a) for a in allowed], 1)
            reason = _REFUSED.get((key, element))
            hint = f"{reason}; " if reason else f"did you mean {close[0]}? " if close else ""
            raise ConfigError(key, f"{element!r} is not allowed", f"{hint}allowed: {listed}")
        if element is None or allowed is not None:
            continue
        for limit, holds, sign in (
            ("ge", lambda a, b: a >= b, ">="),
            ("gt", lambda a, b: a > b, ">"),
            ("le", lambda a, b: a <= b, "<="),
            ("lt", lambda a, b: a < b, "<"),
        ):
            if limit in limits and not holds(element, limits[limit]):
                raise ConfigError(key, f"{element!r} is out of range", f"it must be {sign} {limits[limit]}")


_REFUSED = {
    ("trainer.precision", "bf16-true"): "it casts the expert bias and the master weights to bf16, where small"
    " updates are lost; use bf16-mixed",
    ("trainer.precision", "16-mixed"): "fp16 needs loss scaling, which skips optimizer steps; use bf16-mixed",
    ("trainer.strategy", "fsdp"): "sharding is not built yet; use ddp",
}


def _unknown_key(key: str, name: str, known: list[str], cls: type) -> ConfigError:
    if cls is TrainerConfig and name in MANAGED_TRAINER_ARGUMENTS:
        return ConfigError(key, "is managed by moelm", MANAGED_TRAINER_ARGUMENTS[name])
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(key, "unknown key", f"{hint}allowed: {', '.join(known)}")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def to_dict(config: Any) -> dict[str, Any]:
    """Plain containers; `from_dict(type(config), to_dict(config))` is the same config again."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


# --------------------------------------------------------------------------------------- cross-field checks


def check(config: Config) -> None:
    """Everything that can be known to be wrong before data is read or a device touched. Raises ConfigError."""
    name = config.run_name
    if not re.fullmatch(r"[\w.+-]+", name) or name in (".", ".."):
        raise ConfigError("run.name", f"{name!r} is not a folder name", "use letters, digits, '.', '_', '-'")
    check_corpus(config.data.corpus, "data.corpus")
    check_model(config.model)
    _check_optim(config)
    for i, callback in enumerate(config.callbacks):
        callback.check(f"callbacks.{i}", config)


def check_model(model: ModelConfig) -> None:
    model.attention.check("model.attention", model)
    moe = model.moe
    if moe is None:
        return
    if moe.top_k > moe.n_experts:
        raise ConfigError(
            "model.moe.top_k",
            f"{moe.top_k} is more than n_experts = {moe.n_experts}",
            "lower top_k or raise n_experts; shared experts do not count",
        )
    if moe.first_moe_layer >= model.n_layers:
        raise ConfigError(
            "model.moe.first_moe_layer",
            f"{moe.first_moe_layer} leaves no MoE layer among n_layers = {model.n_layers}",
            "lower it, or set `model.moe: null` for a dense model",
        )
    if moe.n_shared_experts == 0:
        for key in ("d_shared", "shared_gate"):
            if getattr(moe, key):
                raise ConfigError(
                    f"model.moe.{key}", "has no effect with n_shared_experts = 0", "set n_shared_experts"
                )
    if moe.experts.backend == "grouped" and not grouped_widths_fit(model.d_model, moe.d_expert):
        raise ConfigError(
            "model.moe.experts.backend",
            f"grouped needs d_model and d_expert in multiples of 8, not {model.d_model} and {moe.d_expert}",
            "round the widths to a multiple of 8, or use auto or loop",
        )
    moe.router.check("model.moe.router", moe)
    moe.dispatch.check("model.moe.dispatch", moe)
    seen: set[str] = set()
    for i, balancer in enumerate(moe.balancers):
        if balancer.name in seen:
            raise ConfigError(f"model.moe.balancers.{i}", f"{balancer.name!r} is listed twice", "remove one")
        seen.add(balancer.name)
        balancer.check(f"model.moe.balancers.{i}", moe)


def grouped_widths_fit(d_model: int, d_expert: int) -> bool:
    """Rows and weights of a grouped product must start on 16 bytes: 8 elements in bf16."""
    return d_model % 8 == 0 and d_expert % 8 == 0


def check_corpus(corpus: CorpusConfig, key: str) -> None:
    if not re.fullmatch(r"[\w.+-]+", corpus.name):
        raise ConfigError(
            _join(key, "name"), f"{corpus.name!r} is not a folder name", "use letters, digits, . _ -"
        )
    if not corpus.sources:
        raise ConfigError(_join(key, "sources"), "is empty", _names("source"))
    tokenizer = corpus.tokenizer.file
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise ConfigError(
            _join(key, "tokenizer.file"), f"{tokenizer!r}: no such file", "null trains a tokenizer"
        )
    for i, source in enumerate(corpus.sources):
        source.check(_join(key, f"sources.{i}"), corpus)


def _check_optim(config: Config) -> None:
    optim, schedule, steps = config.optim, config.optim.schedule, config.trainer.max_steps
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", f"{optim.betas} is not two numbers in [0, 1)", "try [0.9, 0.95]")
    micro_tokens = optim.micro_batch_size * config.data.seq_len
    if optim.batch_tokens % micro_tokens:
        raise ConfigError(
            "optim.batch_tokens",
            f"{optim.batch_tokens} is not a multiple of micro_batch_size x seq_len = {micro_tokens} tokens",
            f"try {max(1, round(optim.batch_tokens / micro_tokens)) * micro_tokens}",
        )
    if schedule.warmup_steps >= steps and schedule.name != "constant":
        raise ConfigError(
            "optim.schedule.warmup_steps",
            f"{schedule.warmup_steps} leaves nothing of trainer.max_steps = {steps}",
            "lower it",
        )
    if schedule.name == "wsd" and (schedule.decay_steps or 0) + schedule.warmup_steps > steps:
        raise ConfigError(
            "optim.schedule.decay_steps", f"warm-up and decay exceed max_steps = {steps}", "lower one"
        )
    if not all(0 < m < 1 for m in schedule.milestones) or sorted(schedule.milestones) != schedule.milestones:
        raise ConfigError(
            "optim.schedule.milestones", f"{schedule.milestones}", "rising fractions of max_steps in (0, 1)"
        )
    needed_vocab = config.data.corpus.tokenizer
    if needed_vocab.file is None and needed_vocab.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            f"{config.model.vocab_size} is less than the tokenizer's {needed_vocab.vocab_size}",
            "raise it, or lower data.corpus.tokenizer.vocab_size",
        )

"""The whole YAML as typed dataclasses, and the strict loader that turns a file into them.

Reading order: the sections (`Config` at the end names them all), then the registry through which routers,
balancers, attentions, sources and callbacks bring a dataclass of their own, then `load_config`.

Every error is a `ConfigError` that names the key, the value, what is allowed and the remedy.
"""

# ruff: noqa: RUF009  (setting, named and named_list return dataclass fields)
from __future__ import annotations

import dataclasses
import difflib
import io
import itertools
import math
import operator
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar

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


@dataclass
class RouterConfig(NamedConfig):
    """What the rest of the model must know of a router. The ClassVars are facts about it, not settings."""

    routing: ClassVar[str] = "token_choice"  # or expert_choice: which kind of decision it makes
    learned: ClassVar[bool] = True  # has weights that a balancing loss can move
    balanced: ClassVar[bool] = False  # loads experts evenly by construction, so nothing is left to balance
    equal_gates: ClassVar[bool] = False  # gives all its gates the same value
    caution: ClassVar[str] = ""  # what its user must know; said at start
    no_generation: ClassVar[str] = ""  # why text cannot be generated token by token; empty if it can

    route_scale: float = field(default=1.0, metadata={"gt": 0})  # multiplies the gates, after normalisation

    @property
    def provides(self) -> tuple[str, ...]:
        """Keys of RouterStats.extra that some balancer asks for."""
        return ()

    @property
    def n_chunks(self) -> int:
        """Pieces of a token's vector that are routed separately."""
        return 1

    @property
    def mixes_chunks(self) -> bool:
        """Whether a linear layer stands before the split and another one after the merge."""
        return False


@dataclass
class DispatchConfig(NamedConfig):
    accepts: ClassVar[tuple[str, ...]] = ("token_choice",)  # kinds of RouterConfig.routing
    drops: ClassVar[bool] = False  # may leave choices out

    @property
    def no_generation(self) -> str:
        """Why text cannot be generated token by token; empty if it can."""
        return ""

    def check(self, key: str, config: MoEConfig) -> None:
        if config.router.routing not in self.accepts:
            raise ConfigError(
                key,
                f"{self.name} takes {' and '.join(self.accepts)}, but the router {config.router.name} makes "
                f"{config.router.routing}",
                "set model.moe.dispatch=dropless",
            )


_registry: dict[str, dict[str, tuple[type[NamedConfig], Callable[..., Any]]]] = {}
_CONFIG_BASES: dict[str, type[NamedConfig]] = {"router": RouterConfig, "dispatch": DispatchConfig}
F = TypeVar("F", bound=Callable[..., Any])


def register(kind: str, name: str, config_class: type[NamedConfig]) -> Callable[[F], F]:
    """Decorate the class or function that builds `name` from its config; YAML can name it from then on."""
    base = _CONFIG_BASES.get(kind, NamedConfig)
    if not issubclass(config_class, base):
        raise TypeError(f"{kind} {name!r}: {config_class.__name__} must derive from {base.__name__}")

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


REQUIRED = dataclasses.MISSING  # as the default of a setting: the file must give it


def setting(default: Any, **limits: Any) -> Any:
    """A field with limits: `allowed=(...)`, `is_a=(regex, its meaning)`, `ge`, `gt`, `le`, `lt`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


def named(kind: str, default: str) -> Any:
    """A field that holds one registered thing: `{name: top_k, ...}`."""
    return field(default_factory=lambda: make_named(kind, default), metadata={"registry": kind})


def named_list(kind: str, *defaults: str) -> Any:
    return field(default_factory=lambda: [make_named(kind, name) for name in defaults], metadata={"registry": kind})


FOLDER_NAME = (r"\w[\w.+-]{0,79}", "a name of at most 80 letters, digits, '_', and further on '.', '+', '-'")
NOT_EMPTY = (r"(?s).+", "a text that is not empty")


@dataclass
class RunConfig:
    name: str | None = setting(None, is_a=FOLDER_NAME)  # null: the file name of the config
    seed: int = setting(0, ge=0)
    dir: str = setting("checkpoints", is_a=NOT_EMPTY)
    preset: str | None = None  # what runs are compared by; null: the file name of the config


@dataclass
class FeedForwardConfig:
    d_ff: int = setting(512, ge=1)  # width of the dense layers
    activation: str = setting("swiglu", allowed=("swiglu",))


@dataclass
class ExpertsConfig:
    """Of the routed experts alone; dense and shared feed-forwards stay SwiGLU without biases."""

    backend: str = setting("auto", allowed=("auto", "grouped", "loop"))  # auto: grouped where widths allow
    activation: str = setting("swiglu", allowed=("swiglu", "clamped_swiglu"))
    clamp_limit: float = setting(7.0, gt=0)  # clamped_swiglu: gate at most this, up within +- this
    clamp_alpha: float = setting(1.702, gt=0)  # clamped_swiglu: gate * sigmoid(alpha * gate)
    bias: bool = False  # each expert adds a trained bias to gate, up and its output (gpt-oss)


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
    router: RouterConfig = named("router", "top_k")
    balancers: list[NamedConfig] = named_list("balancer", "switch")
    dispatch: DispatchConfig = named("dispatch", "dropless")
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    @property
    def shared_width(self) -> int:
        """Width of the fused shared FFN; 0 without shared experts."""
        if self.n_shared_experts == 0:
            return 0
        return self.d_shared or self.n_shared_experts * self.d_expert

    @property
    def choices_per_token(self) -> int:
        """Rows that the experts compute for one token when nothing is dropped."""
        return self.top_k * self.router.n_chunks

    @property
    def no_generation(self) -> str:
        """Why a model with this section cannot write text token by token; empty if it can."""
        return self.router.no_generation or self.dispatch.no_generation


@dataclass
class InitConfig:
    std: float = setting(0.02, gt=0)
    truncate_sigmas: float | None = setting(None, gt=0)  # cut the normal distribution at this many sigmas
    scale_residual: bool = True  # std / sqrt(2 n_layers) for the matrices that write into the residual stream
    router_std: float | None = setting(None, gt=0)  # of all matrices of a router; null: std


@dataclass
class MultiTokenPredictionConfig:
    """DeepSeek-V3's modules that predict tokens further ahead (docs/maths.md); they train, and write no text."""

    n_modules: int = setting(1, ge=1)  # module k predicts the token k + 1 places ahead
    coef: float = setting(0.3, gt=0)  # multiplies the mean of the modules' cross-entropies (lambda)


@dataclass
class ModelConfig:
    n_layers: int = setting(4, ge=1)
    d_model: int = setting(256, ge=1)
    vocab_size: int = setting(4096, ge=2)
    attention: NamedConfig | list[NamedConfig] = named("attention", "gqa")  # a list: layers take them in turn
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    moe: MoEConfig | None = field(default_factory=MoEConfig)  # null: every layer is dense
    norm: str = setting("rmsnorm", allowed=("rmsnorm", "layernorm"))  # layernorm: without bias (DBRX)
    norm_eps: float = setting(1e-5, gt=0)
    tied_embeddings: bool = True
    dropout: float = setting(0.0, ge=0, lt=1)  # on the embedding and on what attention and FFN add
    init: InitConfig = field(default_factory=InitConfig)
    multi_token_prediction: MultiTokenPredictionConfig | None = None  # null: only the next token

    @property
    def attentions(self) -> list[NamedConfig]:
        """The sections that layers take in turn."""
        return self.attention if isinstance(self.attention, list) else [self.attention]

    def attention_of(self, layer: int) -> NamedConfig:
        return self.attentions[layer % len(self.attentions)]

    def is_moe_layer(self, layer: int) -> bool:
        moe = self.moe
        return (
            moe is not None
            and layer >= moe.first_moe_layer
            and (layer - moe.first_moe_layer) % moe.moe_every_n_layers == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """Of the main model."""
        return [layer for layer in range(self.n_layers) if self.is_moe_layer(layer)]

    @property
    def n_prediction_modules(self) -> int:
        return 0 if self.multi_token_prediction is None else self.multi_token_prediction.n_modules

    @property
    def prediction_layer(self) -> int:
        """The layer whose block the modules of multi-token prediction repeat: the last one with experts, if any."""
        return (self.moe_layers or [self.n_layers - 1])[-1]

    @property
    def routed_layers(self) -> list[int]:
        """Numbers of what stands on the M axis of all statistics: the MoE layers, then the modules of multi-token
        prediction, which count on from n_layers, as in the released weights of DeepSeek-V3."""
        modules = range(self.n_layers, self.n_layers + self.n_prediction_modules) if self.moe_layers else ()
        return [*self.moe_layers, *modules]

    def layer_name(self, layer: int) -> str:
        """`3`, or for a module of multi-token prediction `61 (MTP 1)`, in what people read."""
        return str(layer) if layer < self.n_layers else f"{layer} (MTP {layer - self.n_layers + 1})"


@dataclass
class TokenizerConfig:
    file: str | None = None  # an existing tokenizer.json; null: train a byte-level BPE on the corpus
    vocab_size: int = setting(4096, ge=257)  # 256 bytes, the end-of-text token, and merges
    train_bytes: int = setting(20_000_000, ge=1)  # how much of the corpus the training of the tokenizer reads
    end_of_text: str = setting("<|endoftext|>", is_a=NOT_EMPTY)
    start_of_text: str | None = setting(None, is_a=NOT_EMPTY)  # what generation begins with; null: end_of_text


@dataclass
class CorpusConfig:
    """What `data_prep.prepare` turns into token shards: the content of a `configs/data/*.yaml`."""

    name: str = setting("stdlib", is_a=FOLDER_NAME)
    dir: str | None = setting(None, is_a=NOT_EMPTY)  # null: data/<name>
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
class PhaseConfig:
    """One piece of the schedule `phases`, from where the one before ended."""

    until: float = setting(REQUIRED, gt=0, le=1)  # the fraction of max_steps at which it ends
    shape: str = setting(REQUIRED, allowed=("constant", "linear", "cosine"))
    to: float = setting(REQUIRED, ge=0, le=1)  # the factor at its end; constant: all the way


@dataclass
class ScheduleConfig:
    """Factor on `optim.lr`, by optimizer step; see docs/maths.md for the formulas."""

    name: str = setting("cosine", allowed=("constant", "linear", "cosine", "wsd", "step", "phases"))
    warmup_steps: int = setting(0, ge=0)
    min_lr_ratio: float = setting(0.1, ge=0, le=1)  # where linear, cosine and wsd end
    decay_steps: int | None = setting(None, ge=1)  # wsd: length of the final decay; null: max_steps / 10
    milestones: list[float] = setting([0.8, 0.9])  # step: fractions of max_steps
    factor: float = setting(0.316, gt=0, lt=1)  # step: lr is multiplied by it at each milestone
    phases: list[PhaseConfig] = field(default_factory=list)  # phases: any number of pieces, the last until 1.0


@dataclass
class OptimConfig:
    optimizer: str = setting("adamw", allowed=("adamw", "muon"))  # muon: matrices by Muon, the rest by AdamW
    lr: float = setting(1e-3, gt=0)
    betas: list[float] = setting([0.9, 0.95])  # of AdamW
    momentum: float = setting(0.95, ge=0, lt=1)  # of Muon
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
    devices: int | str | list[int] = "auto"  # how many (-1: all), or the indices of some
    num_nodes: int = setting(1, ge=1)
    strategy: str = setting("auto", allowed=("auto", "ddp"))
    precision: str = setting("32-true", allowed=("32-true", "bf16-mixed"))
    gradient_clip_val: float | None = setting(1.0, gt=0)
    log_every_n_steps: int = setting(10, ge=1)
    limit_val_batches: int | float | None = setting(None, ge=0)  # 2: two micro-batches, 0.5: half of them
    num_sanity_val_steps: int = setting(0, ge=0)
    enable_progress_bar: bool = True
    deterministic: bool | str | None = setting(None, allowed=(None, True, False, "warn"))
    benchmark: bool | None = None
    detect_anomaly: bool | None = None
    profiler: str | None = setting(None, allowed=(None, "simple", "advanced"))
    # moelm's own
    activation_checkpointing: str = setting("none", allowed=("none", "full"))
    compile: bool | str = setting("auto", allowed=("auto", True, False))  # per block; auto: on CUDA only
    float32_matmul_precision: str = setting("highest", allowed=("highest", "high", "medium"))
    expert_parallel: int = setting(1, ge=1, le=1)
    profile: bool = setting(False, allowed=(False,))


OWN_TRAINER_KEYS = ("activation_checkpointing", "compile", "float32_matmul_precision", "expert_parallel", "profile")
MANAGED_TRAINER_ARGUMENTS = {
    "accumulate_grad_batches": "it follows from optim.batch_tokens and optim.micro_batch_size; set those",
    "max_epochs": "a run is measured in optimizer steps; set trainer.max_steps",
    "min_epochs": "a run is measured in optimizer steps; set trainer.max_steps",
    "min_steps": "a run ends at trainer.max_steps; set that",
    "val_check_interval": "validation is counted in optimizer steps; set data.val_every_n_steps",
    "check_val_every_n_epoch": "validation is counted in optimizer steps; set data.val_every_n_steps",
    "max_time": "a run is measured in optimizer steps; set trainer.max_steps, and continue it with --resume auto",
    "limit_train_batches": "a run is measured in optimizer steps; set trainer.max_steps",
    "overfit_batches": "the order of samples never repeats within an epoch; train on a small corpus",
    "fast_dev_run": "for a quick try set trainer.max_steps=2 and trainer.limit_val_batches=2",
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
    callbacks: list[NamedConfig] = named_list(
        "callback",
        *("collapse_alarm", "expert_usage", "balance", "expert_counts", "co_activation", "specialisation"),
        *("throughput", "run_card"),
    )

    @property
    def run_name(self) -> str:
        return self.run.name or "run"

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run_name


# ----------------------------------------------------------------------------------------------- loader

C = TypeVar("C")
_UNPARSABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError)


def load_config(file: str | Path, overrides: Iterable[str] = ()) -> Config:
    """What the file `extends`, the file, then `key=value` overrides; strict, with all cross-field checks.

    Raises ConfigError; touches no device and no data.
    """
    raw = _override(read_yaml(file), overrides)
    run = raw.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = Path(file).stem if run.get("name") is None else run["name"]
        run["preset"] = Path(file).stem if run.get("preset") is None else run["preset"]
    config = from_dict(Config, raw)
    check(config)
    return config


def load_corpus(file: str | Path, overrides: Iterable[str] = ()) -> CorpusConfig:
    """The same for a `configs/data/*.yaml`."""
    raw = {"name": Path(file).stem} | _override(read_yaml(file), overrides)
    corpus = from_dict(CorpusConfig, raw)
    check_corpus(corpus, "")
    return corpus


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
        if path.resolve() in seen:
            raise ConfigError(where, "is part of itself", f"remove one `{named_by}`")
        if path.resolve() in applied:
            return under
        text = path.read_text(encoding="utf-8-sig")
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except OSError as error:  # also what OmegaConf raises for a lone number
        missing = isinstance(error, FileNotFoundError)
        problem = "no such file" if missing else f"cannot be read: {error.strerror or error}"
        raise ConfigError(where, problem, "give the path of a YAML file with sections") from None
    except _UNPARSABLE as error:
        raise ConfigError(where, f"is not valid YAML: {_reason(error)}", "correct it, or quote the value") from None
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(where, "is not a mapping of sections", "see configs/quickstart.yaml")
    raw = {str(key): value for key, value in loaded.items()}
    parents = raw.pop("extends", None) or []
    seen = (*seen, path.resolve())
    for parent in parents if isinstance(parents, list) else [parents]:
        if not isinstance(parent, str):
            raise ConfigError("extends", f"{_show(parent)} is not a path", "name a YAML file, or a list of them")
        under = _read_over(under, applied, path.parent / parent, "extends", seen)
    applied.append(path.resolve())
    return _merge_file(under, raw, path.parent, seen)


def _override(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    for text in overrides:
        key = text.partition("=")[0]
        if "=" not in text or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(text, "is not of the form key=value", "for example trainer.max_steps=100")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
        except _UNPARSABLE as error:
            raise ConfigError(text, f"cannot be parsed: {_reason(error)}", "quote the value") from None
        raw = _merge_file(raw, parsed, Path())
    return raw


def _merge_file(base: Any, change: Any, folder: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """`change` over `base`; the corpus file that it may name, relative to `folder`, replaces the corpus."""
    merged: dict[str, Any] = _merge(base, change)
    data = change.get("data")
    if isinstance(data, dict) and isinstance(data.get("corpus"), str):
        corpus = read_yaml(folder / data["corpus"], "data.corpus", seen)
        merged["data"]["corpus"] = {"name": Path(data["corpus"]).stem} | corpus
    return merged


def _merge(base: Any, change: Any, key: str = "") -> Any:
    """`change` over `base`. A section that names another thing (`name`) replaces the old one whole, since the
    old one's fields mean nothing to it; the names of runs and corpora are only names. `{0: ...}` changes an
    element of a list; a list replaces a list."""
    indices = isinstance(change, dict) and change and all(str(index).isdecimal() for index in change)
    if isinstance(base, list) and indices:
        merged = list(base)
        for index, value in change.items():
            if int(index) >= len(merged):
                raise ConfigError(_join(key, index), f"the list has {len(merged)} elements", "count from 0")
            merged[int(index)] = _merge(merged[int(index)], value, _join(key, index))
        return merged
    if isinstance(base, list) and isinstance(change, dict) and change and "name" not in change:
        remedy = f"number them, {_join(key, '0.' + str(next(iter(change))))} for the first, or give a whole list"
        raise ConfigError(key, f"is a list of {len(base)} here", remedy)
    is_a_name = key == "name" or key.endswith(".name")
    if isinstance(base, str) and not is_a_name and any(base in known for known in _registry.values()):
        base = {"name": base}  # `switch` is short for `{name: switch}`
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    only_a_name = key in ("", "run", "data.corpus") or "name" not in base or "name" not in change
    if not only_a_name and base["name"] != change["name"]:
        return change
    return base | {
        name: _merge(base[name], value, _join(key, name)) if name in base else value for name, value in change.items()
    }


def from_dict(cls: type[C], raw: Any, key: str = "") -> C:
    """A plain mapping -> `cls`, strictly: unknown keys, wrong types and values out of range are errors."""
    assert is_dataclass(cls)
    known = {f.name: f for f in fields(cls) if not (f.name == "name" and issubclass(cls, NamedConfig))}
    listed = ", ".join(known) or "none"
    if not isinstance(raw, dict):
        raise ConfigError(key or "config", f"{_show(raw)} is not a mapping", f"give its keys, of: {listed}")
    try:
        if not key:
            raw = OmegaConf.to_container(OmegaConf.create(raw), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key or "config"))
        remedy = "${...} is a key that the YAML sets, such as ${model.d_model}; ??? is a value to fill in"
        raise ConfigError(where, str(error).splitlines()[0], remedy) from None
    for name in raw:
        if cls is TrainerConfig and name in MANAGED_TRAINER_ARGUMENTS:
            raise ConfigError(_join(key, name), "is managed by moelm", MANAGED_TRAINER_ARGUMENTS[name])
        if name not in known:
            remedy = f"{_did_you_mean(name, known)}allowed: {listed}"
            raise ConfigError(_join(key, name), "unknown key", remedy)
    for name, f in known.items():
        if name not in raw and f.default is f.default_factory is REQUIRED:
            raise ConfigError(_join(key, name), "is missing", f"give all of: {listed}")
    hints = typing.get_type_hints(cls)
    values = {name: _from_value(hints[name], known[name], value, _join(key, name)) for name, value in raw.items()}
    return typing.cast(C, cls(**values))


def _from_value(hint: Any, f: dataclasses.Field[Any], value: Any, key: str) -> Any:
    if "registry" in f.metadata:
        kind = f.metadata["registry"]
        may_be_list = "list" in str(hint)
        if not may_be_list or (typing.get_origin(hint) is not list and not isinstance(value, list)):
            return _from_named(kind, value, key)
        if not isinstance(value, list):
            remedy = f"list them: [{{name: ...}}]; {_names(kind)}"
            raise ConfigError(key, f"{_show(value)} is not a list", remedy)
        return [_from_named(kind, element, f"{key}.{i}") for i, element in enumerate(value)]
    options = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    section = next((option for option in options if is_dataclass(option)), None)
    element = next((each for option in options for each in typing.get_args(option) if is_dataclass(each)), None)
    if (section or element) is not None and value is None and NoneType in options:
        return None
    if element is not None and isinstance(value, list):
        return [from_dict(typing.cast(type[Any], element), each, f"{key}.{i}") for i, each in enumerate(value)]
    if section is not None:
        return from_dict(typing.cast(type[Any], section), value, key)
    if element is not None:
        listed = ", ".join(f"{each.name}: ..." for each in fields(element))
        raise ConfigError(key, f"{_show(value)} is not a list", f"list them: [{{{listed}}}]")
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
    raise ConfigError(key, f"{_show(value)} is not {wanted}", f"give {wanted}")


def _from_named(kind: str, value: Any, key: str) -> NamedConfig:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigError(key, f"{_show(value)} has no `name`", f"write {{name: ...}}; {_names(kind)}")
    name, known = value["name"], registered(kind)
    if not isinstance(name, str) or name not in known:
        problem = f"{_show(name)} is not a known {kind}"
        remedy = f"{_did_you_mean(name, known)}{_names(kind)}; or name the module that registers it with --plugin"
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
    ("trainer.strategy", "fsdp"): "sharding is not built yet; use ddp; ",
}


def _check_limits(limits: typing.Mapping[str, Any], value: Any, key: str) -> None:
    for element in value if isinstance(value, list) else [value]:
        allowed = limits.get("allowed", [element])
        if not any(element == a and type(element) is type(a) for a in allowed):
            shown = [a if isinstance(a, str) else _show(a) for a in allowed]
            reason = _REFUSED.get((key, str(element)), _did_you_mean(element, shown))
            raise ConfigError(key, f"{_show(element)} is not allowed", f"{reason}allowed: {', '.join(shown)}")
        if element is None:
            continue
        pattern, meaning = limits.get("is_a", ("", ""))
        if pattern and not re.fullmatch(pattern, element):
            raise ConfigError(key, f"{_show(element)} is not allowed", f"give {meaning}")
        bounds = {"lt": 2**63, **limits} if isinstance(element, int | float) else {}
        for limit, sign in _LIMITS.items():
            if limit in bounds and not getattr(operator, limit)(element, bounds[limit]):
                problem = f"{_show(element)} is out of range"
                raise ConfigError(key, problem, f"it must be {sign} {bounds[limit]}")


def _did_you_mean(value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    return f"did you mean {close[0]}? " if close else ""


def _names(kind: str) -> str:
    return f"allowed: {', '.join(registered(kind))}"


def _show(value: Any) -> str:
    """A value in an error message: on one line, not too long, and spelled as YAML spells it."""
    text = repr(value)
    if not isinstance(value, str):
        text = re.sub(r"\b(None|True|False)\b", lambda word: {"None": "null"}.get(word[0], word[0].lower()), text)
    return text if len(text) <= 80 else text[:77] + "..."


def _reason(error: Exception) -> str:
    """The message of a parser on one line, without what OmegaConf says of its own types."""
    text = re.sub(r"\s*(object_type|reference_type)=.*", "", str(error))
    return " ".join(re.sub(r'in "<[\w ]+>", ', "at ", text).split())


def _join(key: str, name: Any) -> str:
    name = str(name) if re.fullmatch(r"\w+", str(name)) else repr(name)
    return f"{key}.{name}" if key else name


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
        return {k: v for name, branch in tree.items() for k, v in flatten(branch, _join(key, str(name))).items()}

    left, right = flatten(a), flatten(b)
    keys = sorted((left.keys() | right.keys()) - set(ignore))
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


# --------------------------------------------------------------------------------------- cross-field checks


def check(config: Config) -> None:
    """All that can be known to be wrong before data is read or a device touched. Raises ConfigError."""
    check_corpus(config.data.corpus, "data.corpus")
    check_model(config.model)
    _check_optim(config)
    _check_trainer(config.trainer)
    _check_each(config.callbacks, "callbacks", config)
    moe, seq_len = config.model.moe, config.data.seq_len
    if moe is not None and moe.router.routing == "expert_choice" and seq_len * moe.top_k < moe.n_experts:
        problem = f"{seq_len} tokens x top_k = {moe.top_k} leave less than one for each of {moe.n_experts} experts"
        raise ConfigError("data.seq_len", problem, "raise it, or model.moe.top_k")
    n_modules = config.model.n_prediction_modules
    if n_modules >= seq_len:
        problem = f"{n_modules} modules look further ahead than data.seq_len = {seq_len} tokens"
        raise ConfigError("model.multi_token_prediction.n_modules", problem, f"at most {seq_len - 1}")
    tokenizer = config.data.corpus.tokenizer
    if tokenizer.file is None and tokenizer.vocab_size > config.model.vocab_size:
        problem = f"{config.model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}"
        raise ConfigError("model.vocab_size", problem, "raise it, or lower data.corpus.tokenizer.vocab_size")


def _check_each(things: list[NamedConfig], key: str, section: Any) -> None:
    for i, thing in enumerate(things):
        if thing.name in [earlier.name for earlier in things[:i]]:
            raise ConfigError(f"{key}.{i}", f"{thing.name!r} is listed twice", "remove one")
        thing.check(f"{key}.{i}", section)


def check_model(model: ModelConfig) -> None:
    if len(model.attentions) not in range(1, model.n_layers + 1):
        problem = f"{len(model.attentions)} attentions for n_layers = {model.n_layers}"
        raise ConfigError("model.attention", problem, "list at least one and at most as many as there are layers")
    for i, attention in enumerate(model.attentions):
        attention.check(f"model.attention.{i}" if isinstance(model.attention, list) else "model.attention", model)
    moe = model.moe
    if moe is None:
        return
    if moe.top_k > moe.n_experts:
        problem = f"{moe.top_k} is more than n_experts = {moe.n_experts}"
        raise ConfigError("model.moe.top_k", problem, "lower top_k or raise n_experts; shared experts do not count")
    if moe.first_moe_layer >= model.n_layers:
        problem = f"{moe.first_moe_layer} leaves no MoE layer among n_layers = {model.n_layers}"
        remedy = "lower it, or set `model.moe: null` for a dense model"
        raise ConfigError("model.moe.first_moe_layer", problem, remedy)
    for key in ("d_shared", "shared_gate"):
        if moe.n_shared_experts == 0 and getattr(moe, key):
            problem = "has no effect with n_shared_experts = 0"
            raise ConfigError(f"model.moe.{key}", problem, "set n_shared_experts")
    moe.router.check("model.moe.router", moe)
    if model.d_model % moe.router.n_chunks:
        problem = f"{moe.router.n_chunks} chunks do not divide d_model = {model.d_model}"
        raise ConfigError("model.moe.router", problem, "choose a divisor")
    width = model.d_model // moe.router.n_chunks
    if moe.experts.backend == "grouped" and not grouped_widths_fit(width, moe.d_expert):
        d_in = "d_model" if moe.router.n_chunks == 1 else f"d_model / {moe.router.n_chunks} chunks"
        problem = f"grouped needs multiples of 8, not {d_in} = {width}, d_expert = {moe.d_expert}"
        raise ConfigError("model.moe.experts.backend", problem, "round the widths, or use auto or loop")
    for key in ("clamp_limit", "clamp_alpha"):
        if moe.experts.activation != "clamped_swiglu" and getattr(moe.experts, key) != getattr(ExpertsConfig(), key):
            problem = f"{getattr(moe.experts, key)} has no effect with the activation {moe.experts.activation}"
            raise ConfigError(f"model.moe.experts.{key}", problem, "remove it, or set activation: clamped_swiglu")
    moe.dispatch.check("model.moe.dispatch", moe)
    _check_each(moe.balancers, "model.moe.balancers", moe)


def grouped_widths_fit(d_in: int, d_expert: int) -> bool:
    """Rows and weights of a grouped product must start on 16 bytes: 8 elements in bf16."""
    return d_in % 8 == 0 and d_expert % 8 == 0


def check_corpus(corpus: CorpusConfig, key: str) -> None:
    if not corpus.sources:
        raise ConfigError(_join(key, "sources"), "is empty", _names("source"))
    tokenizer = corpus.tokenizer.file
    if tokenizer is not None and not Path(tokenizer).is_file():
        problem = f"{tokenizer!r}: no such file"
        raise ConfigError(_join(_join(key, "tokenizer"), "file"), problem, "null trains a tokenizer")
    for i, source in enumerate(corpus.sources):
        source.check(_join(_join(key, "sources"), i), corpus)


_ONLY_WITH = {  # key of optim.schedule -> the schedules that read it
    "min_lr_ratio": ("linear", "cosine", "wsd"),
    "decay_steps": ("wsd",),
    "milestones": ("step",),
    "factor": ("step",),
    "phases": ("phases",),
}


def _check_optim(config: Config) -> None:
    optim, schedule, steps = config.optim, config.optim.schedule, config.trainer.max_steps
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", f"{optim.betas} is not two numbers in [0, 1)", "try [0.9, 0.95]")
    micro = optim.micro_batch_size * config.data.seq_len
    if optim.batch_tokens % micro:
        problem = f"{optim.batch_tokens} is not a multiple of micro_batch_size x seq_len = {micro} tokens"
        raise ConfigError("optim.batch_tokens", problem, f"try {max(1, round(optim.batch_tokens / micro)) * micro}")
    if optim.optimizer != "muon" and optim.momentum != OptimConfig().momentum:
        problem = f"{optim.momentum} has no effect with the optimizer {optim.optimizer}"
        raise ConfigError("optim.momentum", problem, "remove it, or set optimizer: muon")
    for key, names in _ONLY_WITH.items():
        if schedule.name not in names and getattr(schedule, key) != getattr(ScheduleConfig(), key):
            problem = f"{_show(to_dict(schedule)[key])} has no effect with the schedule {schedule.name}"
            raise ConfigError(f"optim.schedule.{key}", problem, f"remove it, or set name: {' or '.join(names)}")
    if schedule.warmup_steps >= steps and schedule.name != "constant":
        problem = f"{schedule.warmup_steps} leaves nothing of trainer.max_steps = {steps}"
        raise ConfigError("optim.schedule.warmup_steps", problem, "lower it")
    decay = schedule.decay_steps or max(1, steps // 10)
    if schedule.name == "wsd" and decay + schedule.warmup_steps > steps:
        problem = f"{decay} and {schedule.warmup_steps} of warm-up exceed trainer.max_steps = {steps}"
        raise ConfigError("optim.schedule.decay_steps", problem, "lower one of them")
    rising = schedule.milestones == sorted(set(schedule.milestones)) != []
    if not rising or not all(0 < milestone < 1 for milestone in schedule.milestones):
        problem = f"{schedule.milestones} is not rising fractions of max_steps in (0, 1)"
        raise ConfigError("optim.schedule.milestones", problem, "try [0.8, 0.9]")
    if schedule.name == "phases":
        _check_phases(schedule, steps)


def _check_phases(schedule: ScheduleConfig, max_steps: int) -> None:
    key, ends = "optim.schedule.phases", [phase.until for phase in schedule.phases]
    if not ends:
        raise ConfigError(key, "is empty", "list them: [{until: 1.0, shape: cosine, to: 0.1}]")
    for i, (before, end) in enumerate(itertools.pairwise(ends), 1):
        if end <= before:
            raise ConfigError(f"{key}.{i}.until", f"{end} does not follow {before}", "phases go by rising `until`")
    if ends[-1] != 1:
        problem = f"{ends[-1]} leaves the rest of the run without a phase"
        raise ConfigError(f"{key}.{len(ends) - 1}.until", problem, "the last phase goes until 1.0")
    steps = [0, *(round(end * max_steps) for end in ends)]
    for i, (begin, end) in enumerate(itertools.pairwise(steps)):
        if begin == end:
            problem = f"{ends[i]} leaves the phase no step of trainer.max_steps = {max_steps}"
            raise ConfigError(f"{key}.{i}.until", problem, "raise trainer.max_steps, or give fewer phases")
    if schedule.warmup_steps >= steps[1]:
        problem = f"{schedule.warmup_steps} leaves nothing of the first phase, which ends at step {steps[1]}"
        raise ConfigError("optim.schedule.warmup_steps", problem, f"lower it, or raise {key}.0.until")


def _check_trainer(trainer: TrainerConfig) -> None:
    devices, share = trainer.devices, trainer.limit_val_batches
    if isinstance(devices, list):
        right = devices != [] and len(set(devices)) == len(devices) and min(devices) >= 0
    else:
        right = devices in ("auto", -1) or (isinstance(devices, int) and devices >= 1)
    if not right:
        remedy = "give how many, -1 or auto for all, or indices such as [0, 1]"
        raise ConfigError("trainer.devices", f"{_show(devices)} is not allowed", remedy)
    if isinstance(share, float) and share > 1:
        remedy = "give a whole number of batches, or a share of at most 1.0"
        raise ConfigError("trainer.limit_val_batches", f"{share} is not allowed", remedy)

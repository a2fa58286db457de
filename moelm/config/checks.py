"""Cross-field checks: all that can be known to be wrong before data is read or a device touched."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from moelm.config.errors import ConfigError, join, show
from moelm.config.registry import NamedConfig, SourceConfig, allowed_names
from moelm.config.sections import (
    Config,
    CorpusConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
)
from moelm.config.typed import to_dict


def check(config: Config) -> None:
    """All that can be known to be wrong before data is read or a device touched. Raises ConfigError."""
    check_corpus(config.data.corpus, "data.corpus")
    check_model(config.model)
    _check_optim(config)
    _check_trainer(config.trainer)
    _check_replicas(config.trainer)
    _check_expert_parallel(config)
    _check_fused(config)
    _check_each(config.callbacks, "callbacks", config)
    moe, seq_len = config.model.moe, config.data.seq_len
    if moe is not None and moe.router.routing == "expert_choice" and seq_len * moe.top_k < moe.n_experts:
        problem = f"{seq_len} tokens x top_k = {moe.top_k} leave less than one for each of {moe.n_experts} experts"
        raise ConfigError("data.seq_len", problem, "raise it, or model.moe.top_k")
    moves_bias = moe is not None and any(getattr(balancer, "moves_bias", False) for balancer in moe.balancers)
    if moe is not None and getattr(moe.router, "selection_bias", False) and not moves_bias:
        problem = "true has no effect without a balancer that moves the bias"
        raise ConfigError("model.moe.router.selection_bias", problem, "add loss_free to model.moe.balancers")
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
    backend = moe.experts.backend
    if backend in ("fused", "grouped") and not grouped_widths_fit(width, moe.d_expert):
        d_in = "d_model" if moe.router.n_chunks == 1 else f"d_model / {moe.router.n_chunks} chunks"
        problem = f"{backend} needs multiples of 8, not {d_in} = {width}, d_expert = {moe.d_expert}"
        raise ConfigError("model.moe.experts.backend", problem, "round the widths, or use auto or loop")
    reason = why_not_fused(moe, width)
    if backend == "fused" and reason:
        raise ConfigError("model.moe.experts.backend", f"fused cannot be: {reason}", "use auto, grouped or loop")
    for key in ("clamp_limit", "clamp_alpha"):
        if moe.experts.activation != "clamped_swiglu" and getattr(moe.experts, key) != getattr(ExpertsConfig(), key):
            problem = f"{getattr(moe.experts, key)} has no effect with the activation {moe.experts.activation}"
            raise ConfigError(f"model.moe.experts.{key}", problem, "remove it, or set activation: clamped_swiglu")
    moe.dispatch.check("model.moe.dispatch", moe)
    _check_each(moe.balancers, "model.moe.balancers", moe)


def grouped_widths_fit(d_in: int, d_expert: int) -> bool:
    """Rows and weights of a grouped product must start on 16 bytes: 8 elements in bf16."""
    return d_in % 8 == 0 and d_expert % 8 == 0


def why_not_fused(moe: MoEConfig, d_in: int) -> str:
    """What the fused kernels of the experts cannot compute of this section; empty if nothing."""
    if moe.router.routing != "token_choice":
        return f"the router {moe.router.name} makes {moe.router.routing}, not token_choice"
    if moe.experts.activation != "swiglu":
        return f"the activation is {moe.experts.activation}, not swiglu"
    if moe.experts.bias:
        return "the experts have biases"
    return "" if grouped_widths_fit(d_in, moe.d_expert) else "a width is no multiple of 8"


def check_corpus(corpus: CorpusConfig, key: str, reads_text: bool | None = None) -> None:
    """`reads_text`: are the files there that it is prepared from? None: asked only where it is not prepared, since its
    shards may have been taken to another machine."""
    if not corpus.sources:
        raise ConfigError(join(key, "sources"), "is empty", allowed_names("source"))
    for i, source in enumerate(corpus.sources):
        source.check(join(join(key, "sources"), i), corpus)
    if reads_text is None:
        reads_text = not (corpus.path / "manifest.json").is_file()
    if not reads_text:
        return
    tokenizer = corpus.tokenizer.file
    if tokenizer is not None and not Path(tokenizer).is_file():
        problem = f"{tokenizer!r}: no such file"
        raise ConfigError(join(join(key, "tokenizer"), "file"), problem, "null trains a tokenizer")
    for i, source in enumerate(corpus.sources):
        if isinstance(source, SourceConfig):
            source.check_files(join(join(key, "sources"), i))


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
    if optim.optimizer == "muon" and optim.moments != "float32":
        problem = f"{optim.moments!r} has no effect with the optimizer muon, whose moments are float32"
        raise ConfigError("optim.moments", problem, "remove it, or set optimizer: adamw")
    for key, names in _ONLY_WITH.items():
        if schedule.name not in names and getattr(schedule, key) != getattr(ScheduleConfig(), key):
            problem = f"{show(to_dict(schedule)[key])} has no effect with the schedule {schedule.name}"
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


def _check_fused(config: Config) -> None:
    moe, precision = config.model.moe, config.trainer.precision
    if moe is not None and moe.experts.backend == "fused" and precision != "bf16-mixed":
        problem = f"fused computes in bfloat16, not in trainer.precision = {precision}"
        raise ConfigError("model.moe.experts.backend", problem, "set trainer.precision=bf16-mixed, or use auto")


def _check_replicas(trainer: TrainerConfig) -> None:
    if trainer.replicas > 1 and trainer.strategy != "fsdp":
        problem = f"{trainer.replicas} cannot be with trainer.strategy = {trainer.strategy}"
        raise ConfigError("trainer.replicas", problem, "set trainer.strategy=fsdp, or remove it")


def _check_expert_parallel(config: Config) -> None:
    key, n_ranks, moe = "trainer.expert_parallel", config.trainer.expert_parallel, config.model.moe
    if n_ranks == 1:
        if config.trainer.static_exchange:
            problem = "true has no effect where no ranks share the experts"
            raise ConfigError("trainer.static_exchange", problem, f"remove it, or set {key} to 2 or more")
        return
    if config.trainer.strategy != "fsdp":
        problem = f"{n_ranks} cannot be with trainer.strategy = {config.trainer.strategy}"
        raise ConfigError(key, problem, "set trainer.strategy=fsdp, or remove it")
    if moe is None:
        raise ConfigError(key, f"{n_ranks} has no effect in a dense model", "remove it")
    if moe.router.routing != "token_choice":
        problem = f"{n_ranks} ranks can share experts that tokens choose; the router {moe.router.name} makes "
        raise ConfigError(key, problem + moe.router.routing, "remove it, or set another model.moe.router")
    if moe.n_experts % n_ranks:
        divisors = ", ".join(str(n) for n in range(2, moe.n_experts + 1) if moe.n_experts % n == 0)
        problem = f"{n_ranks} does not divide model.moe.n_experts = {moe.n_experts}"
        raise ConfigError(key, problem, f"choose one of {divisors}")


MOST_DEVICES = 4096  # of one node


def _check_trainer(trainer: TrainerConfig) -> None:
    devices, share = trainer.devices, trainer.limit_val_batches
    if isinstance(devices, list):
        right = devices != [] and len(set(devices)) == len(devices) and min(devices) >= 0
    else:
        right = devices in ("auto", -1) or (isinstance(devices, int) and 1 <= devices <= MOST_DEVICES)
    if not right:
        remedy = f"give how many (at most {MOST_DEVICES}), -1 or auto for all, or indices such as [0, 1]"
        raise ConfigError("trainer.devices", f"{show(devices)} is not allowed", remedy)
    if isinstance(share, float) and share > 1:
        remedy = "give a whole number of batches, or a share of at most 1.0"
        raise ConfigError("trainer.limit_val_batches", f"{share} is not allowed", remedy)
    if not trainer.reshard_after_forward and trainer.strategy != "fsdp":
        problem = f"false has no effect with strategy = {trainer.strategy}, where nothing is gathered"
        raise ConfigError("trainer.reshard_after_forward", problem, "remove it, or set trainer.strategy=fsdp")
    if trainer.reduce_dtype == "bfloat16" and (trainer.strategy, trainer.precision) != ("fsdp", "bf16-mixed"):
        problem = f"bfloat16 has no effect with strategy = {trainer.strategy}, precision = {trainer.precision}"
        remedy = "remove it, or set trainer.strategy=fsdp and trainer.precision=bf16-mixed"
        raise ConfigError("trainer.reduce_dtype", problem, remedy)
    if trainer.reduce_dtype == "bfloat16" and trainer.accumulate_unreduced:
        problem = "bfloat16 with trainer.accumulate_unreduced = true would add up micro-batches in bfloat16"
        raise ConfigError("trainer.reduce_dtype", problem, "set one of the two only")
    if trainer.accumulate_unreduced and trainer.strategy != "fsdp":
        problem = f"has no effect with strategy = {trainer.strategy}, which always sends gradients once a step"
        raise ConfigError("trainer.accumulate_unreduced", problem, "remove it, or set trainer.strategy=fsdp")

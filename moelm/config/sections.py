"""The sections of the YAML as dataclasses; `Config` at the end names them all."""

# ruff: noqa: RUF009  (setting, named and named_list return dataclass fields)
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelm.config.registry import DispatchConfig, NamedConfig, RouterConfig, make_named

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

    # loop: one expert after the other. grouped: one product for all. fused: dispatch, products, activation and combine
    # as one op, on CUDA in bf16. auto: the last of these that device, precision, router and experts allow
    backend: str = setting("auto", allowed=("auto", "fused", "grouped", "loop"))
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

    n_modules: int = setting(1, ge=1, le=100)  # module k predicts the token k + 1 places ahead
    coef: float = setting(0.3, gt=0)  # multiplies the mean of the modules' cross-entropies (lambda)


@dataclass
class ModelConfig:
    n_layers: int = setting(4, ge=1, le=10_000)
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
    n_workers: int = setting(0, ge=0, le=256)  # processes that read shards; reading is a memory map, 0 is fast


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
    moments: str = setting("float32", allowed=("float32", "bfloat16"))  # of AdamW, for tensors of 2^20 elements or more
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
    num_nodes: int = setting(1, ge=1, le=10_000)
    strategy: str = setting("auto", allowed=("auto", "ddp", "fsdp"))  # auto: ddp on several devices; fsdp: FSDP2
    precision: str = setting("32-true", allowed=("32-true", "bf16-mixed"))  # bf16-mixed: float32 weights, bf16 products
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
    # what backward computes again instead of keeping it. selective: what is elementwise; full: each block, but for the
    # routers' choices
    activation_checkpointing: str = setting("none", allowed=("none", "selective", "full"))
    # per block; cuda_graphs: its kernels are launched at once, as recorded; under fsdp only without
    # reshard_after_forward. auto: false on a CPU; cuda_graphs where they can be, under fsdp only with one micro-batch a
    # step; else true
    compile: bool | str = setting("auto", allowed=("auto", True, False, "cuda_graphs"))
    float32_matmul_precision: str = setting("highest", allowed=("highest", "high", "medium"))
    expert_parallel: int = setting(1, ge=1)  # fsdp: ranks that share the experts, each holding some whole ones
    # with expert_parallel: all tokens go to all ranks that share the experts, with room for all their choices; the host
    # never waits for their number
    static_exchange: bool = False
    replicas: int = setting(1, ge=1)  # fsdp: groups of ranks of which each holds a whole model, sharded inside it
    reshard_after_forward: bool = True  # fsdp; false: blocks are sent once a micro-batch, experts once a step
    # fsdp with bf16-mixed: in which the gradients of blocks are sent and summed over ranks; bfloat16: half the bytes,
    # rounded once more for each rank on their way
    reduce_dtype: str = setting("float32", allowed=("float32", "bfloat16"))
    accumulate_unreduced: bool = False  # fsdp: a device sums its own gradients of all weights, sent once a step
    stop_within_s: float = setting(600.0, gt=0, le=10**6)  # after a signal to end; then it ends anyhow
    # without the end of a batch; then the run ends; null: never
    stall_timeout_s: float | None = setting(900.0, gt=0, le=10**6)
    # steps that a run may leave out because loss or gradient norm is not finite, or the loss jumps; at the next one it
    # ends
    max_skipped_steps: int = setting(0, ge=0)
    max_loss_spike: float | None = setting(None, gt=1)  # a jump: cross-entropy above this x the median of 32 steps
    profile: bool = False  # trace five steps after warm-up; the run's folder gets profile/


OWN_TRAINER_KEYS = (
    *("activation_checkpointing", "compile", "float32_matmul_precision", "expert_parallel", "accumulate_unreduced"),
    *("replicas", "reshard_after_forward", "stop_within_s", "max_skipped_steps", "max_loss_spike", "profile"),
    *("stall_timeout_s", "static_exchange", "reduce_dtype"),
)
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
    asynchronous: bool = False  # written beside training, from a copy in the host's memory


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

"""The whole YAML as typed dataclasses, and the strict loader that turns a file into them.

Read `sections` (the dataclasses; `Config` names them all), `registry` (how routers, balancers, attentions, sources and
callbacks bring a dataclass of their own), `loader` (files, `extends`, overrides), `typed` (plain containers to
dataclasses, strictly), `checks` (across fields). Every error is a `ConfigError` that names the key, the value, what is
allowed and the remedy. Nothing here needs torch.
"""

from moelm.config.checks import (
    check,
    check_corpus,
    check_model,
    grouped_widths_fit,
    why_not_fused,
)
from moelm.config.errors import (
    ConfigError,
    UserError,
)
from moelm.config.loader import (
    load_config,
    load_corpus,
    read_yaml,
)
from moelm.config.registry import (
    DispatchConfig,
    NamedConfig,
    RouterConfig,
    SourceConfig,
    build,
    make_named,
    register,
    registered,
)
from moelm.config.sections import (
    MANAGED_TRAINER_ARGUMENTS,
    OWN_TRAINER_KEYS,
    Config,
    CorpusConfig,
    DataConfig,
    ExpertsConfig,
    InitConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainerConfig,
    setting,
)
from moelm.config.typed import (
    differences,
    from_dict,
    to_dict,
    to_yaml,
)

__all__ = [
    "MANAGED_TRAINER_ARGUMENTS",
    "OWN_TRAINER_KEYS",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "DataConfig",
    "DispatchConfig",
    "ExpertsConfig",
    "InitConfig",
    "MoEConfig",
    "ModelConfig",
    "NamedConfig",
    "OptimConfig",
    "PhaseConfig",
    "RouterConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "UserError",
    "build",
    "check",
    "check_corpus",
    "check_model",
    "differences",
    "from_dict",
    "grouped_widths_fit",
    "load_config",
    "load_corpus",
    "make_named",
    "read_yaml",
    "register",
    "registered",
    "setting",
    "to_dict",
    "to_yaml",
    "why_not_fused",
]

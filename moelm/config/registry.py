"""Name -> Config class and factory: through it routers, balancers, attentions, sources and callbacks bring a dataclass
of their own, which the YAML names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from moelm.config.errors import ConfigError

if TYPE_CHECKING:
    from moelm.config.sections import MoEConfig


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


@dataclass
class SourceConfig(NamedConfig):
    def check_files(self, key: str) -> None:
        """Is what text is read from there? Raises ConfigError."""

    def files(self) -> list[Path] | None:
        """Those on this machine that text is read from; None where it is not read from files that are named."""
        return None


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


def is_registered(name: Any) -> bool:
    """As anything."""
    return any(name in known for known in _registry.values())


def make_named(kind: str, name: str) -> NamedConfig:
    return registered(kind)[name](name=name)


def build(kind: str, config: NamedConfig, *args: Any, **kwargs: Any) -> Any:
    """Call the factory that is registered for `config.name` with `(config, *args, **kwargs)`."""
    return _registry[kind][config.name][1](config, *args, **kwargs)


def allowed_names(kind: str) -> str:
    return f"allowed: {', '.join(registered(kind))}"

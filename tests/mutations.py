"""Configs and files as they should not be: seeded mutations, and what may come of a command that is given one."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
import signal
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from moelm.config import Config, UserError, from_dict, registered, to_dict

Path_ = tuple[Any, ...]  # of keys and indices


# ------------------------------------------------------------------------------------------------ bases


def bases(corpus: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Whole configs of runs of two steps that take a moment, every key spelled out; between them they use all sections."""
    common: dict[str, Any] = {
        "run": {"name": "mutated", "dir": str(folder / "runs"), "preset": "mutated"},
        "data": {"corpus": corpus, "seq_len": 16, "val_every_n_steps": 2},
        "optim": {"batch_tokens": 64, "micro_batch_size": 2},
        "trainer": {
            **{"max_steps": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
            **{"limit_val_batches": 1, "log_every_n_steps": 1},
        },
        "checkpoint": {"every_n_steps": 1},
    }
    small = {"n_layers": 2, "d_model": 16, "vocab_size": 320, "feed_forward": {"d_ff": 24}}
    gqa = {"name": "gqa", "n_heads": 2, "n_kv_heads": 1}
    mla = {"name": "mla", "n_heads": 2, "q_latent_dim": 8, "kv_latent_dim": 8, "nope_head_dim": 8, "rope_head_dim": 4}
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 8}
    sigmoid = {"name": "top_k", "score": "sigmoid", "selection_bias": True, "n_groups": 2, "normalize_gates": "after_top_k"}
    windowed = gqa | {"sliding_window": 4, "sinks": True, "qk_norm": "head", "qkv_bias": True}
    yarn = {"kind": "yarn", "factor": 4.0, "original_context": 16}
    changes: list[dict[str, Any]] = [
        {"model": small | {"attention": gqa, "moe": moe | {"balancers": ["switch", "z_loss"]}}},
        {
            "model": small
            | {
                "attention": mla | {"rope_scaling": yarn},
                "moe": moe
                | {"router": sigmoid, "balancers": [{"name": "loss_free"}, "sequence"], "n_shared_experts": 1}
                | {"first_moe_layer": 1, "shared_gate": True},
                "multi_token_prediction": {"n_modules": 1},
            },
            "optim": {"optimizer": "muon", "schedule": {"name": "wsd", "decay_steps": 1}},
        },
        {
            "model": small
            | {
                "attention": [gqa, windowed],
                "moe": moe
                | {"router": "gshard", "dispatch": {"name": "capacity"}, "balancers": ["importance"]}
                | {"experts": {"activation": "clamped_swiglu", "bias": True, "backend": "loop"}},
                "dropout": 0.1,
                "norm": "layernorm",
            },
            "trainer": {"activation_checkpointing": "full"},
            "optim": {"schedule": {"name": "step"}},
        },
        {
            "model": small | {"attention": gqa, "moe": None, "tied_embeddings": False},
            "optim": {
                "schedule": {"name": "phases", "phases": [{"until": 1.0, "shape": "cosine", "to": 0.1}]},
                "micro_batch_size": 4,
            },
            "checkpoint": {"asynchronous": True},
            "data": {"mask_documents": True},
        },
    ]
    return [to_dict(from_dict(Config, _over(common, change))) for change in changes]


def _over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    both = {k: _over(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in change.items()}
    return copy.deepcopy(base | both)


# ------------------------------------------------------------------------------------------ of a tree

NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 5, 7, 64, 257, 1000, 10**6, 10**9, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 10**30, 10**400, -1, -(10**9)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 2.5, 1e-3, 1e-30, 1e-45, 1e-310, 1e10, 1e30, 1e38, 1e300, -0.5, -1e300),
    *(math.nan, math.inf, -math.inf),
]
TEXTS: list[str] = [
    *("", " ", "auto", "none", "null", "true", "yes", "1", "1e400", "1e-3", "0x10", "1_000", "nan", "inf", "-1", "3.0"),
    *("../../escape", "/dev/null", "a\0b", "a\nb", "ü", "日本", "\u202e", "🙂", "a" * 5000, "~", "*", "'", '"', "#", "%s"),
    *("${model.d_model}", "${nothing}", "${", "${oc.env:HOME}", "???", "!!python/name:os.system", "{}", "[]", "a: b"),
]
OTHERS: list[Any] = [None, True, False, [], {}, [None], [[]], [1], ["a"], {"a": 1}, {"name": None}, {"name": "top_k"}, {1: 2}]


def leaves(tree: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Of all that is in a tree, sections too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from leaves(value, (*at, key))


def get(tree: Any, at: Path_) -> Any:
    for key in at:
        tree = tree[key]
    return tree


def _nested(rng: random.Random) -> Any:
    value: Any = rng.choice([1, "a", None])
    for _ in range(rng.choice([2, 10, 60])):
        value = rng.choice([[value], {"a": value}, {"name": value}])
    return value


def _typo(name: Any, rng: random.Random) -> Any:
    text = str(name)
    i = rng.randrange(max(1, len(text)))
    return rng.choice(
        [
            text[:i] + text[i + 1 :],
            text[:i] + text[i : i + 1] + text[i:],
            text[:i] + rng.choice(string.ascii_lowercase + "_-. éа") + text[i + 1 :],
            text.upper(),
            text + " ",
            text.replace("_", "-"),
            text.replace("a", "а"),  # cyrillic
            i,
            "",
            "extends",
            None,
        ]
    )


def mutate(tree: dict[str, Any], rng: random.Random) -> str:
    """One change, in place; says which."""
    at = rng.choice(list(leaves(tree)))
    parent, key = get(tree, at[:-1]), at[-1]
    old = parent[key]
    kind = rng.choices(
        ["number", "near", "delete", "typo", "text", "other", "name", "swap", "copy", "nest", "add"],
        [30, 15, 8, 8, 12, 12, 12, 6, 4, 2, 3],
    )[0]
    if kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice([old + 1, old - 1, old * 2, old * 3, old / 2, -old, old * 1000, str(old), float(old)])
    elif kind == "delete":
        del parent[key]
    elif kind == "typo" and isinstance(parent, dict):
        parent[_typo(key, rng)] = parent.pop(key)
    elif kind == "text":
        parent[key] = rng.choice(TEXTS)
    elif kind == "other":
        parent[key] = copy.deepcopy(rng.choice(OTHERS))
    elif kind == "name":
        named = [p for p in leaves(tree) if p[-1] == "name" and len(p) > 2 and p[0] != "run"]
        at = rng.choice(named)
        names = [name for of in KINDS for name in registered(of)]
        section = get(tree, at[:-1])
        name = rng.choice(names)
        if rng.random() < 0.8:  # with that thing's own defaults
            section.clear()
        section["name"] = name
    elif kind == "swap":
        other = rng.choice([p for p in leaves(tree) if p[: len(at)] != at and at[: len(p)] != p])
        parent[key], get(tree, other[:-1])[other[-1]] = get(tree, other), old
    elif kind == "copy":
        other = rng.choice(list(leaves(tree)))
        parent[key] = copy.deepcopy(get(tree, other))
    elif kind == "nest":
        parent[key] = _nested(rng)
    elif kind == "add" and isinstance(old, list):
        old.append(copy.deepcopy(rng.choice([*old, *OTHERS, *TEXTS])))
    else:
        numbers = [p for p in leaves(tree) if isinstance(get(tree, p), int | float) and not isinstance(get(tree, p), bool)]
        at = rng.choice(numbers or [at])
        get(tree, at[:-1])[at[-1]] = rng.choice(NUMBERS)
    return f"{kind} {'.'.join(map(str, at))}"


KINDS = ("router", "balancer", "dispatch", "attention", "callback", "source")


# ------------------------------------------------------------------------------------------- of its text


def mutate_text(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    at = rng.randrange(len(text))
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for n in range(12):
        bomb += f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n"
    choices: list[Callable[[], bytes]] = [
        lambda: text[:at].encode(),
        lambda: "".join(lines[:i] + lines[i + 1 :]).encode(),
        lambda: "".join([*lines[:i], lines[i], *lines[i:]]).encode(),
        lambda: "".join([*lines[:i], lines[j], *lines[i:]]).encode(),
        lambda: "".join([*lines[:i], "\t" + lines[i], *lines[i + 1 :]]).encode(),
        lambda: "".join([*lines[:i], " " + lines[i], *lines[i + 1 :]]).encode(),
        lambda: (text[:at] + chr(rng.choice([0, 7, 27, 0x85, 0x2028, 0xFEFF, 0xFFFE, 0x1F600, *range(33, 127)])) + text[at:]).encode(),
        lambda: text[:at].encode() + bytes([rng.randrange(256)]) + text[at + 1 :].encode(),
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: b"",
        lambda: rng.randbytes(300),
        lambda: (bomb + text).encode(),
        lambda: (text + "more: " + "[" * 3000).encode(),
        lambda: (text + "---\n" + text).encode(),
        lambda: (text + "<<: *nothing\n").encode(),
        lambda: ("base: &b {seed: 5}\n" + text).encode(),
        lambda: text.replace("seed: 0", "seed: &s 4", 1).replace("max_steps: 2", "max_steps: *s", 1).encode(),
        lambda: (text + f"extends: {rng.choice(['.', 'nothing.yaml', 'mutated.yaml', '/dev/null', '/dev/zero', '[]', '3'])}\n").encode(),
        lambda: text.replace(": 2\n", f": {rng.choice(['!!python/object/apply:os.mkdir [executed]', '!!binary aaaa', '!x 2', '|', '2 2', '[2', '0b10', '2:30', '2026-01-01', '9' * 5000])}\n", 1).encode(),
        lambda: text.replace(":", "", 1 + rng.randrange(3)).encode(),
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: text.replace("\n", "\r").encode(),
    ]
    return rng.choice(choices)()


# --------------------------------------------------------------------------------------- what may come of it


class TookTooLong(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TookTooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(main: Callable[[list[str]], None], argv: list[str], seconds: float = 30) -> tuple[str, str]:
    """("ran" or "refused" or "fault", what it said): of a command as `command_line.run` would end it."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(seconds):
            main(argv)
    except UserError as error:
        return _refusal(str(error), err.getvalue())
    except SystemExit as error:
        if isinstance(error.code, str):
            return _refusal(error.code, err.getvalue())
        return ("refused" if error.code in (1, 2) else "fault"), f"exit {error.code}: {err.getvalue()}"
    except OSError as error:
        if error.filename is not None:
            return _refusal(f"{error.filename}: {error.strerror}", err.getvalue())
        return "fault", _trace(error)
    except BaseException as error:
        return "fault", _trace(error)
    said = out.getvalue() + err.getvalue()
    return ("fault" if "Traceback" in said else "ran"), said


def _refusal(message: str, said: str) -> tuple[str, str]:
    bad = "Traceback" in message + said or not message.strip() or len(message) > 4000
    return ("fault" if bad else "refused"), message


def _trace(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def unsaid(said: Any, resolved: Any, key: str = "") -> list[str]:
    """Keys whose value in a resolved config is not the one that the YAML gave."""
    if isinstance(said, dict) and isinstance(resolved, dict):
        found = []
        for name, value in said.items():
            if name == "extends" and not key:
                continue
            if name not in resolved:
                found.append(f"{key}.{name} is gone")
            else:
                found += unsaid(value, resolved[name], f"{key}.{name}")
        return found
    if isinstance(said, list) and isinstance(resolved, list) and len(said) == len(resolved):
        return [each for i, pair in enumerate(zip(said, resolved, strict=True)) for each in unsaid(*pair, f"{key}.{i}")]
    if isinstance(said, str) and isinstance(resolved, dict):
        said, resolved = said, resolved.get("name", resolved) if key != ".data.corpus" else said
    if key in (".run.name", ".run.preset") and said is None:
        return []
    if isinstance(said, str) and "${" in said:
        return []
    return [] if _same(said, resolved) else [f"{key}: {said!r} became {resolved!r}"]


def _same(said: Any, got: Any) -> bool:
    if isinstance(said, bool) or isinstance(got, bool):
        return str(said).lower() == str(got).lower() and not isinstance(said, int | float) or said is got
    if isinstance(said, str) and isinstance(got, int | float):
        try:
            return float(said) == float(got) and (isinstance(got, float) or int(float(said)) == got or int(said) == got)
        except (ValueError, OverflowError):
            return False
    if isinstance(said, int) and isinstance(got, str):
        return str(said) == got
    return type(said) is type(got) and said == got or (isinstance(said, int | float) and isinstance(got, int | float) and said == got)


def dumped(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False, default_flow_style=None)

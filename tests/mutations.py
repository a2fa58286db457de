"""Configs and files as they should not be: seeded mutations, and what may come of a command that is given one."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import pickle
import random
import signal
import string
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from moelm.config import Config, UserError, from_dict, registered, to_dict
from moelm.config.registry import _registry

Place = tuple[Any, ...]  # in a tree: keys and indices


# ------------------------------------------------------------------------------------------------ bases


def bases(corpus: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Configs of runs of two steps that take a moment, every key spelled out; together they use all sections."""
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
    sigmoid = {
        "name": "top_k",
        "score": "sigmoid",
        "selection_bias": True,
        "n_groups": 2,
        "normalize_gates": "after_top_k",
    }
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
    both = {
        k: _over(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in change.items()
    }
    return copy.deepcopy(base | both)


# ------------------------------------------------------------------------------------------ of a tree

NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 5, 7, 64, 257, 1000, 10**6, 10**9, 2**31, 2**53 + 1, 2**62, 2**63 - 1, 2**63),
    *(10**30, 10**400, -1, -(10**9)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 2.5, 1e-3, 1e-30, 1e-45, 1e-310, 1e10, 1e30, 1e38, 1e300, -0.5, -1e300),
    *(math.nan, math.inf, -math.inf),
]
TEXTS: list[str] = [
    *("", " ", "auto", "none", "null", "true", "yes", "1", "1e400", "1e-3", "0x10", "1_000", "nan", "inf", "-1", "3.0"),
    *("../../escape", "/dev/null", "a\0b", "a\nb", "ü", "日本", "\u202e", "🙂", "a" * 5000),
    *("~", "*", "'", '"', "#", "%s"),
    *("${model.d_model}", "${nothing}", "${", "${oc.env:HOME}", "???", "!!python/name:os.system", "{}", "[]", "a: b"),
]
OTHERS: list[Any] = [
    *(None, True, False, [], {}, [None], [[]], [1], ["a"], {"a": 1}, {"name": None}, {"name": "top_k"}),
    {1: 2},
]


def leaves(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Of all that is in a tree, sections too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from leaves(value, (*at, key))


def get(tree: Any, at: Place) -> Any:
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
        names = [name for of in KINDS for name in registered(of) if is_own(of, name)]
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
        numbers = [
            p for p in leaves(tree) if isinstance(get(tree, p), int | float) and not isinstance(get(tree, p), bool)
        ]
        at = rng.choice(numbers or [at])
        get(tree, at[:-1])[at[-1]] = rng.choice(NUMBERS)
    return f"{kind} {'.'.join(map(str, at))}"


def is_own(kind: str, name: str) -> bool:
    """Not of a test, so that a seed means the same whatever tests ran before."""
    return _registry[kind][name][1].__module__.startswith("moelm.")


KINDS = ("router", "balancer", "dispatch", "attention", "callback", "source")


# ------------------------------------------------------------------------------------------- of its text


EXTENDED = (".", "nothing.yaml", "mutated.yaml", "/dev/null", "/dev/zero", "[]", "3")
VALUES = (
    *("!!python/object/apply:os.mkdir [executed]", "!!python/name:os.system", "!!binary aaaa", "!x 2", "|", "2 2"),
    *("[2", "0b10", "2:30", "2026-01-01", "9" * 5000, "*nothing", "&a [*a]"),
)
CHARACTERS = (0, 7, 27, 0x85, 0x2028, 0xFEFF, 0xFFFE, 0x1F600, *range(33, 127))


def mutate_text(text: str, rng: random.Random) -> bytes:
    """One change of a YAML that a tree would not have."""
    lines = text.splitlines(keepends=True)
    i, j, at = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.randrange(len(text))
    before, line, after = "".join(lines[:i]), lines[i], "".join(lines[i + 1 :])
    choices: list[str | bytes] = [
        *(text[:at], before + after, before + line + line + after, before + lines[j] + line + after),
        *(before + "\t" + line + after, before + " " + line + after),
        text[:at] + chr(rng.choice(CHARACTERS)) + text[at:],
        text[:at].encode() + bytes([rng.randrange(256)]) + text[at + 1 :].encode(),
        *(text.encode("utf-16"), "\ufeff" + text, "", rng.randbytes(300), _bomb() + text, text + "more: " + "[" * 3000),
        *(text + "---\n" + text, text + "<<: *nothing\n", "base: &b {seed: 5}\n" + text),
        text.replace("seed: 0", "seed: &s 4", 1).replace("max_steps: 2", "max_steps: *s", 1),
        text + f"extends: {rng.choice(EXTENDED)}\n",
        text.replace(": 2\n", f": {rng.choice(VALUES)}\n", 1),
        text.replace(":", "", 1 + rng.randrange(3)),
        *(text.replace("\n", "\r\n"), text.replace("\n", "\r")),
    ]
    chosen = rng.choice(choices)
    return chosen.encode() if isinstance(chosen, str) else chosen


def _bomb() -> str:
    """A billion laughs."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ files


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


KINDS_OF_DAMAGE = (
    *("truncated", "flipped", "flipped", "flipped header", "empty", "swapped", "pickle", "pickle of torch", "zeros"),
    *("longer", "random", "folder", "link out", "link to itself", "missing", "edited", "edited", "edited", "edited"),
)


def damage(file: Path, others: list[Path], mark: Path, rng: random.Random) -> str:
    """One change; says which. `mark` is what a pickle would make if it were loaded."""
    old, kind, new = file.read_bytes(), rng.choice(KINDS_OF_DAMAGE), None
    if kind == "truncated":
        new = old[: rng.randrange(len(old))]
    elif kind in ("flipped", "flipped header"):
        at = rng.randrange(len(old) if kind == "flipped" else min(64, len(old)))
        new = old[:at] + bytes([old[at] ^ 1 << rng.randrange(8)]) + old[at + 1 :]
    elif kind == "swapped":
        new = rng.choice(others).read_bytes()
    elif kind == "pickle":
        new = pickle.dumps({"moelm": Bomb(mark)})
    elif kind == "pickle of torch":
        new = _saved({"moelm": Bomb(mark)})
    elif kind in ("empty", "zeros", "longer", "random"):
        new = {"empty": b"", "zeros": bytes(len(old)), "longer": old + bytes(8), "random": rng.randbytes(500)}[kind]
    elif kind == "edited":
        kind, new = _edited(file, old, rng)
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "link to itself":
            file.symlink_to(file)
        elif kind == "link out":
            outside = mark.with_name("outside")
            outside.write_bytes(old)
            file.symlink_to(rng.choice([outside, Path("/dev/zero"), Path("/etc/passwd")]))
    if new is not None:
        file.write_bytes(new)
    return kind


def _edited(file: Path, old: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What stands in it, changed in a way that its format allows."""
    if file.suffix == ".yaml":
        tree = yaml.safe_load(old)
        return f"edited: {mutate(tree, rng)}", dumped(tree).encode()
    if file.suffix == ".json":
        tree = json.loads(old)
        return f"edited: {_edit(tree, rng)}", json.dumps(tree).encode()
    if file.suffix == ".pt":
        tree = torch.load(io.BytesIO(old), weights_only=True)
        tensors = [torch.zeros(3), torch.tensor(5), torch.full((2, 2), math.nan), torch.zeros(0), torch.ones(1) > 0]
        return f"edited: {_edit(tree, rng, tensors)}", _saved(tree)
    if file.suffix == ".safetensors":
        n = struct.unpack("<Q", old[:8])[0]
        header, body = json.loads(old[8 : 8 + n]), bytearray(old[8 + n :])
        if rng.random() < 0.3:
            at = 4 * rng.randrange(len(body) // 4)
            body[at : at + 4] = struct.pack("<f", math.nan)
            return "a NaN", old[: 8 + n] + bytes(body)
        what = _edit(header, rng)
        text = json.dumps(header).encode()
        return f"edited: {what}", struct.pack("<Q", len(text)) + text + bytes(body)
    at = rng.randrange(len(old))
    return "a byte", old[:at] + bytes([old[at] ^ 255]) + old[at + 1 :]


def _edit(tree: Any, rng: random.Random, more: list[Any] | None = None) -> str:
    at = rng.choice(list(leaves(tree)))
    parent = get(tree, at[:-1])
    numbers = [number for number in NUMBERS if abs(number) < 10**300]
    kind = rng.choice(["number", "text", "other", "delete", "copy"])
    if not isinstance(parent, dict | list):  # a tuple
        return "nothing"
    if kind == "delete":
        del parent[at[-1]]
    elif kind == "copy":
        parent[at[-1]] = copy.deepcopy(get(tree, rng.choice(list(leaves(tree)))))
    else:
        choices = {"number": numbers, "text": TEXTS, "other": [*OTHERS[:-1], *(more or [])]}[kind]
        parent[at[-1]] = copy.deepcopy(rng.choice(choices))
    return f"{kind} {'.'.join(map(str, at))}"


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------- what may come of it


class Enough(BaseException):
    """A run that would go on for long was begun well."""


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


def outcome(main: Callable[[list[str]], None], argv: list[str], seconds: float = 60) -> tuple[str, str]:
    """("ran", what it printed), ("refused", the message) or ("fault", the traceback): of a command, as
    `command_line.run` would end it."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(seconds):
            main(argv)
    except UserError as error:
        return _judged(str(error), err.getvalue())
    except SystemExit as error:
        if isinstance(error.code, str):
            return _judged(error.code, err.getvalue())
        return "fault", f"exit {error.code}: {err.getvalue()}"
    except OSError as error:
        if error.filename is not None:
            return _judged(f"{error.filename}: {error.strerror}", err.getvalue())
        return "fault", "".join(traceback.format_exception(error))
    except Enough:
        return "ran", out.getvalue()
    except BaseException as error:
        return "fault", "".join(traceback.format_exception(error))
    return ("fault", err.getvalue()) if "Traceback" in err.getvalue() else ("ran", out.getvalue())


def _judged(message: str, said_before: str = "") -> tuple[str, str]:
    bad = "Traceback" in message + said_before or not message.strip() or len(message) > 4000
    return ("fault" if bad else "refused"), message


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
    if isinstance(said, str) and isinstance(resolved, dict):  # `switch` is short for {name: switch}
        resolved = resolved.get("name")
    if (said is None and key in (".run.name", ".run.preset")) or (isinstance(said, str) and "${" in said):
        return []
    return [] if _same(said, resolved) else [f"{key}: {said!r} became {resolved!r}"]


def _same(said: Any, got: Any) -> bool:
    """The same value, also as YAML spells it in quotes."""
    if isinstance(said, bool) or isinstance(got, bool):
        return said is got or (isinstance(said, str) and said.lower() == str(got).lower())
    if isinstance(said, str) and isinstance(got, int | float):
        with contextlib.suppress(ValueError):
            return type(got)(said) == got
        return False
    if isinstance(said, int) and isinstance(got, str):
        return str(said) == got
    return bool(said == got)


def dumped(tree: Any) -> str:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False, default_flow_style=None)

"""What every error of a config is made of: the key, the value, what is allowed, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, ClassVar


class UserError(Exception):
    """Something the person at the terminal can put right. Commands print its message and exit with code 2."""

    remedy: ClassVar[str] = ""  # of all errors of a class, where the message names no other


class ConfigError(UserError):
    def __init__(self, key: str, problem: str, remedy: str = "") -> None:
        self.key = key
        super().__init__(f"{key}: {problem}" + (f"\n  remedy: {remedy}" if remedy else ""))


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    return f"did you mean {close[0]}? " if close else ""


def show(value: Any) -> str:
    """A value in an error message: on one line, not too long, and spelled as YAML spells it."""
    text = repr(value)
    if not isinstance(value, str):
        text = re.sub(r"\b(None|True|False)\b", lambda word: {"None": "null"}.get(word[0], word[0].lower()), text)
    return text if len(text) <= 80 else text[:77] + "..."


def reason(error: Exception) -> str:
    """The message of a parser on one line, without what OmegaConf says of its own types."""
    text = re.sub(r"\s*(object_type|reference_type)=.*", "", str(error))
    return " ".join(re.sub(r'in "<[\w ]+>", ', "at ", text).split())


def join(key: str, name: Any) -> str:
    name = str(name) if re.fullmatch(r"\w+", str(name)) else repr(name)
    return f"{key}.{name}" if key else name

"""The tokenizer of a model folder: which tokens begin and end a text, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing

from moelm.config import TokenizerConfig
from moelm.data.tokenizer import leave_length
from moelm.hub.folder import read_json
from moelm.hub.reading import HubError, show


def read_tokenizer(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode("a")  # one without a token for what it does not know may fail at that
    except Exception as error:  # the library raises plain Exception
        raise HubError(f"{file}: not a tokenizer of the `tokenizers` library", [str(error)]) from None
    leave_length(tokenizer)
    return tokenizer


def read_special_tokens(folder: Path, hf: dict[str, Any], vocab_size: int) -> TokenizerConfig:
    """What ends a text, by one of the files beside the tokenizer, and what the tokenizer itself puts before one.

    Raises HubError for a tokenizer that lacks every token said to end a text, or has an id past `vocab_size`.
    """
    config, file = TokenizerConfig(), folder / "tokenizer.json"
    if not file.is_file():
        return config
    tokenizer = read_tokenizer(file)
    config.start_of_text = token_put_first(tokenizer)
    token_of = {number: token for token, number in tokenizer.get_vocab().items()}
    largest = max(token_of, default=0)
    if largest >= vocab_size:
        raise HubError(f"{file}: has the id {largest} ({token_of[largest]!r}), but the vocab_size is {vocab_size}", [])
    said = _said_to_end(folder, hf) | {"by default": config.end_of_text}
    for end in said.values():
        token = token_of.get(end) if type(end) is int else end
        if isinstance(token, str) and token in token_of.values():
            config.end_of_text = token
            return config
    special = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    reasons = [f"{where}: {show(end)}" for where, end in said.items()]
    reasons.append(f"name one as eos_token in {folder / 'tokenizer_config.json'}; its special tokens: {show(special)}")
    raise HubError(f"{file}: has none of the tokens that are said to end a text", reasons)


def left_behind(folder: Path, hf: dict[str, Any], config: TokenizerConfig) -> list[str]:
    """What a folder says of texts that a checkpoint has no place for, so that an export would not say it."""
    if not (folder / "tokenizer.json").is_file():
        return ["no tokenizer.json: the checkpoint cannot generate or be evaluated"]
    notes, said = [], {name: _json_of(folder, name) for name in ("tokenizer_config.json", "generation_config.json")}
    if config.start_of_text is None:
        notes.append(
            f"the tokenizer puts nothing before a text; here {config.end_of_text!r} comes first, as in training"
        )
    if said["tokenizer_config.json"].get("chat_template") or (folder / "chat_template.jinja").is_file():
        notes.append("left out: the chat template")
    ends = [value for value in _said_to_end(folder, hf).values() if type(value) is int]
    if len(set(ends)) > 1:
        notes.append(f"left out: all tokens that end a text but {config.end_of_text!r}, of the ids {sorted(set(ends))}")
    sampling = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    if settings := [key for key in sampling if said["generation_config.json"].get(key)]:
        notes.append(f"left out: {', '.join(settings)} of generation_config.json")
    return notes


def _json_of(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _said_to_end(folder: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Where it is said -> a token or an id, the most trusted first."""
    said: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"):
        content = hf if name == "config.json" else _json_of(folder, name)
        token, ids = content.get("eos_token"), content.get("eos_token_id")
        said[f"eos_token of {name}"] = token.get("content") if isinstance(token, dict) else token
        for i, number in enumerate(ids if isinstance(ids, list) else [ids]):
            said[f"eos_token_id {i} of {name}"] = number
    return {where: end for where, end in said.items() if end is not None}


def token_put_first(tokenizer: Tokenizer) -> str | None:
    """The one token that encoding puts before every text; None if it puts none."""
    with_it, without = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
    if not without or with_it[1 : 1 + len(without)] != without or with_it[: len(without)] == without:
        return None
    return tokenizer.id_to_token(with_it[0])


def special_ids(source: Path, config: TokenizerConfig) -> dict[str, int]:
    """The bos_token_id and eos_token_id of the model. Raises HubError for a tokenizer without these tokens."""
    vocabulary = read_tokenizer(source).get_vocab()
    tokens = {"bos_token_id": config.start_of_text or config.end_of_text, "eos_token_id": config.end_of_text}
    if absent := [f"{token!r}, its {key}" for key, token in tokens.items() if token not in vocabulary]:
        raise HubError(f"{source}: lacks what data.corpus.tokenizer of the checkpoint names", absent)
    return {key: vocabulary[token] for key, token in tokens.items()}


def write_tokenizer(source: Path, folder: Path, config: TokenizerConfig, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json with which transformers feeds the model what `moelm.generate` does: the
    start of a text, then the ids. The tokenizer must have the tokens: see `special_ids`. Raises OSError."""
    tokenizer = read_tokenizer(source)
    start, end = config.start_of_text or config.end_of_text, config.end_of_text
    if token_put_first(tokenizer) != start:
        put_first = TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start}:1 $B:1",
            special_tokens=[(start, tokenizer.token_to_id(start))],
        )
        own = tokenizer.post_processor
        tokenizer.post_processor = put_first if own is None else Sequence([own, put_first])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a prompt that spells a special token is the text that it is
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

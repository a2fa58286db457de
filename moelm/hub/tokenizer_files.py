"""The tokenizer of a model folder: which tokens begin and end a text, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing

from moelm.config import TokenizerConfig
from moelm.hub.folder import read_json
from moelm.hub.reading import HubError


def read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise HubError(f"{file}: not a tokenizer of the `tokenizers` library", [str(error)]) from None


def read_special_tokens(folder: Path, hf: dict[str, Any]) -> TokenizerConfig:
    """What ends a text (the eos of tokenizer_config.json, else of config.json), and what the tokenizer itself puts
    before one. A token that cannot be found out keeps its default."""
    config = TokenizerConfig()
    said = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    end = said.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        ids = hf.get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        end = end or (tokenizer.id_to_token(first) if isinstance(first, int) and first >= 0 else None)
        config.start_of_text = token_put_first(tokenizer)
    if isinstance(end, str) and end:
        config.end_of_text = end
    return config


def token_put_first(tokenizer: Tokenizer) -> str | None:
    """The one token that encoding puts before every text; None if it puts none."""
    with_it, without = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
    if not without or with_it[1 : 1 + len(without)] != without or with_it[: len(without)] == without:
        return None
    return tokenizer.id_to_token(with_it[0])


def write_tokenizer(source: Path, folder: Path, config: TokenizerConfig, max_length: int) -> dict[str, int]:
    """tokenizer.json and tokenizer_config.json with which transformers feeds the model what `moelm.generate` does: the
    start of a text, then the ids. Returns the bos_token_id and eos_token_id of the model.

    Raises HubError for a tokenizer without these tokens.
    """
    tokenizer = read_tokenizer(source)
    start, end = config.start_of_text or config.end_of_text, config.end_of_text
    start_id, end_id = (tokenizer.token_to_id(token) for token in (start, end))
    if start_id is None or end_id is None:
        absent = start if start_id is None else end
        raise HubError(f"{source}: has no token {absent!r}", ["data.corpus.tokenizer of the checkpoint names it"])
    if token_put_first(tokenizer) != start:
        put_first = TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, start_id)]
        )
        own = tokenizer.post_processor
        tokenizer.post_processor = put_first if own is None else Sequence([own, put_first])
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a prompt that spells a special token is the text that it is
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return {"bos_token_id": start_id, "eos_token_id": end_id}

"""The tokenizer of a corpus: a byte-level BPE trained on a sample of it, or a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Tokenizer

from moelm.config import TokenizerConfig, UserError
from moelm.data.sampler import hash64


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE with the end-of-text token; smaller than `vocab_size` if the text is too small for it."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.end_of_text],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Sample:
    """At most about `budget` bytes of text from a stream of any length, in one pass, the same in every run.

    Each piece has a hash, uniform in [0, 1); a domain keeps those below its rate, at first all. Whenever the
    budget is exceeded, the domain that holds most halves its rate. So every domain is sampled over its whole
    length, a small one is kept whole beside a large one, and none vanishes: each keeps at least one piece.
    """

    def __init__(self, budget: int, seed: int) -> None:
        self.budget = budget
        self.seed = seed
        self.n_seen = 0
        self.kept: dict[str, list[tuple[float, str, int]]] = {}  # domain -> (hash, text, bytes)
        self.n_bytes: dict[str, int] = {}
        self.rate: dict[str, float] = {}

    def add(self, text: str, domain: str, n_bytes: int) -> None:
        chance = hash64(self.seed, self.n_seen, 1) / 2**64
        self.n_seen += 1
        if chance < self.rate.setdefault(domain, 1.0):
            self.kept.setdefault(domain, []).append((chance, text, n_bytes))
            self.n_bytes[domain] = self.n_bytes.get(domain, 0) + n_bytes
            self._thin()

    def _thin(self) -> None:
        while sum(self.n_bytes.values()) > self.budget:
            shrinkable = [domain for domain, kept in self.kept.items() if len(kept) > 1]
            if not shrinkable:
                return
            domain = max(shrinkable, key=lambda name: self.n_bytes[name])
            self.rate[domain] /= 2
            kept = self.kept[domain]
            self.kept[domain] = [one for one in kept if one[0] < self.rate[domain]] or [min(kept)]
            self.n_bytes[domain] = sum(n_bytes for _, _, n_bytes in self.kept[domain])

    def texts(self) -> Iterator[str]:
        return (text for kept in self.kept.values() for _, text, _ in kept)


def read_tokenizer(file: str) -> Tokenizer:
    """Raises UserError for a file that is none."""
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{file}: not a tokenizer: {error}\n  remedy: give a tokenizer.json of the `tokenizers` library"
        ) from None


def load_tokenizer(config: TokenizerConfig, file: str) -> Tokenizer:
    """Raises UserError for a file that is none, or lacks the token at the end or at the start of a text."""
    tokenizer = read_tokenizer(file)
    check_tokens(config, tokenizer, file)
    tokenizer.add_special_tokens([AddedToken(config.end_of_text, special=True)])  # if it was an ordinary one
    leave_length(tokenizer)
    return tokenizer


def check_tokens(config: TokenizerConfig, tokenizer: Tokenizer, file: str) -> None:
    """Raises UserError for a tokenizer without those at the end and at the start of a text."""
    for key, token in (("end_of_text", config.end_of_text), ("start_of_text", config.start_of_text)):
        if token is not None and tokenizer.token_to_id(token) is None:
            remedy = f"set data.corpus.tokenizer.{key} to one that it has"
            raise UserError(f"{file}: has no token {token!r}\n  remedy: {remedy}")


def leave_length(tokenizer: Tokenizer) -> None:
    """A file may say that what is encoded is cut or padded to a length."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


def encode_prompt(tokenizer: Tokenizer, config: TokenizerConfig, text: str) -> list[int]:
    """What a model is given to continue: the start of a text, then the ids of `text`, in which a special token that is
    spelled out is the text that it is. Raises UserError for a tokenizer without the start."""
    start = tokenizer.token_to_id(config.start_of_text or config.end_of_text)
    if start is None:
        key = "start_of_text" if config.start_of_text else "end_of_text"
        raise UserError(
            f"the tokenizer has no token {config.start_of_text or config.end_of_text!r}\n"
            f"  remedy: set data.corpus.tokenizer.{key} to one that it has"
        )
    leave_length(tokenizer)
    tokenizer.encode_special_tokens = True
    return [start, *tokenizer.encode(text, add_special_tokens=False).ids]

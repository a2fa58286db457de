"""python -m moelm.generate --checkpoint RUN_OR_STEP --prompt "...": continue a text, token by token."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moelm import command_line
from moelm.config import ConfigError, ModelConfig, UserError
from moelm.data.sources import encodable
from moelm.data.tokenizer import encode_prompt, read_tokenizer
from moelm.model.gpt import GPT
from moelm.training.checkpoint_io import find_checkpoint, load_checkpoint_config, tokenizer_file
from moelm.training.loading import autocast, load_model

EPILOG = """example:
  python -m moelm.generate --checkpoint checkpoints/quickstart --prompt "def read(self" --max-new-tokens 200
"""


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.generate",
        "Continue a text, streamed as it is generated.",
        EPILOG,
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_STEP")
    parser.add_argument("--prompt", default="", help="the text to continue; empty: the start of a document")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token (greedy)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="sample from the likeliest mass P")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    arguments = command_line.parse(parser, argv)
    for key, holds, allowed in (
        ("max_new_tokens", 1 <= arguments.max_new_tokens < 2**31, ">= 1 and < 2**31"),
        ("temperature", arguments.temperature >= 0, ">= 0"),
        ("top_p", 0 < arguments.top_p <= 1, "in (0, 1]"),
        ("seed", 0 <= arguments.seed < 2**63, ">= 0 and < 2**63"),
    ):
        if not holds:
            raise ConfigError(f"--{key.replace('_', '-')}", f"{getattr(arguments, key)}", f"it must be {allowed}")
    folder = find_checkpoint(arguments.checkpoint)
    saved = load_checkpoint_config(folder)
    refuse_without_generation(saved.model, str(folder))
    tokenizer = read_tokenizer(str(tokenizer_file(folder)))
    section = saved.data.corpus.tokenizer
    end = tokenizer.token_to_id(section.end_of_text)
    given = encodable(arguments.prompt)  # what a terminal sends need not be UTF-8
    prompt = encode_prompt(tokenizer, section, given)
    model, config, device = load_model(folder)
    if len(prompt) + arguments.max_new_tokens > config.data.seq_len:
        print(
            f"note: trained on sequences of {config.data.seq_len} tokens; later text is worse",
            file=sys.stderr,
        )
    print(given, end="", flush=True)
    with autocast(config, device):
        ids = generate(
            model,
            torch.tensor([prompt], device=device),
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            end_of_text=end,
        )
        for text in stream_text(tokenizer, ids, prompt):
            print(text, end="", flush=True)
    print()


def refuse_without_generation(config: ModelConfig, what: str) -> None:
    """Raises ConfigError for a model whose output for a token depends on other tokens than those before it."""
    reason = config.moe.no_generation if config.moe is not None else ""
    if reason:
        raise ConfigError(
            "model.moe",
            f"{what} cannot generate: {reason}",
            "evaluate it with python -m moelm.evaluate, or train with a token-choice router and dropless dispatch "
            "(capacity has eval_dispatch: dropless)",
        )


@torch.no_grad()
def generate(
    model: GPT,
    prompt_1L: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_of_text: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield new token ids until `end_of_text` or `max_new_tokens`; `use_cache` changes the speed, not the text.

    `prompt_1L`: int64 [1, L], L >= 1. temperature 0 is greedy. The model is used in evaluation mode. Raises
    ConfigError for a model that cannot generate.
    """
    refuse_without_generation(model.config, "this model")
    model.eval()
    dtype = (
        torch.get_autocast_dtype(prompt_1L.device.type) if torch.is_autocast_enabled(prompt_1L.device.type) else None
    )
    try:
        cache = model.init_cache(1, prompt_1L.shape[1] + max_new_tokens, dtype) if use_cache else None
    except RuntimeError as error:
        problem = f"no memory for the keys and values of {max_new_tokens:,} tokens"
        raise ConfigError("--max-new-tokens", problem, "ask for fewer") from error
    generator = torch.Generator(device=prompt_1L.device).manual_seed(seed)
    tokens_1L = fed_1L = prompt_1L
    for _ in range(max_new_tokens):
        logits = model(fed_1L, cache=cache).logits
        token = choose_token(logits[0, -1].float(), temperature, top_p, generator)
        if int(token) == end_of_text:
            return
        yield int(token)
        tokens_1L = torch.cat([tokens_1L, token.view(1, 1)], 1)
        fed_1L = tokens_1L if cache is None else token.view(1, 1)


def choose_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """The likeliest token at temperature 0, else one drawn from the smallest set of probability >= top_p."""
    if temperature == 0:
        return logits_V.argmax()
    probabilities, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    if not math.isfinite(probabilities[0]):
        raise UserError("the model's output is no number: its weights are not finite, or --temperature is too small")
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < top_p)
    return order[torch.multinomial(kept, 1, generator=generator)[0]]


def stream_text(tokenizer: Tokenizer, ids: Iterator[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Decode what follows `prompt` as ids arrive; a character whose bytes are still incomplete waits for the next id.
    The whole text is decoded each time, since what an id stands for can depend on those before it: the first of a
    SentencePiece text has no space before it."""
    seen = list(prompt)
    shown = text = tokenizer.decode(seen)
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


if __name__ == "__main__":
    command_line.run(main)

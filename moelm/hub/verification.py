"""Whether what a conversion wrote is what it should be, found out from the files alone.

The names and shapes that must be there come from the side that will load them: GPT, or transformers. The values are
taken back through the map, in the direction that did not write them, and compared with the source bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moelm.config import differences, to_dict
from moelm.data.tokenizer import encode_prompt
from moelm.hub.comparison import differences_in_effect
from moelm.hub.exporting import Export
from moelm.hub.folder import ModelFolder
from moelm.hub.importing import Import
from moelm.hub.reading import HubError, show, transformers
from moelm.hub.streaming import by_layer, cast
from moelm.hub.tokenizer_files import read_tokenizer
from moelm.training.checkpoint_io import has_file, load_checkpoint_config, verify_checkpoint, weight_files
from moelm.training.weight_files import TensorFiles

PROBES = ("", "a", "def f(x):\n    return 1", " Zwei  Wörter, 日本\n")


def verify_import(source: Import, checkpoint: Path) -> int:
    """How many tensors were compared. Raises UserError with all that is wrong."""
    verify_checkpoint(checkpoint)
    said, wanted = (to_dict(model) for model in (load_checkpoint_config(checkpoint).model, source.folder.config))
    if wrong := differences(said, wanted):
        reasons = [f"model.{key} is {show(here)}, its source has {show(there)}" for key, (here, there) in wrong.items()]
        raise HubError(f"{checkpoint / 'config.yaml'} is not that of the model", reasons)
    written = TensorFiles(weight_files(checkpoint))
    reasons = compare_shapes({name: tuple(tensor.shape) for name, tensor in source.empty.items()}, written.shapes)
    n_compared = 0
    for weight in by_layer([] if reasons else source.weights, "verifying"):
        is_state = weight.ours[0] in source.state
        for name, tensor in weight.to_theirs(written).items():
            expected = cast(source.folder.tensors[name], name, source.dtype, is_state)
            reasons += compare_values(name, tensor, expected)
            n_compared += 1
    raise_if(checkpoint, reasons)
    return n_compared


def verify_export(source: Export, model: Path) -> int:
    """The same for a folder of transformers, with what its tokenizer makes of some prompts."""
    folder = ModelFolder(model)
    reasons = differences_in_effect(folder.config, source.architecture.read_config(source.hf), "the checkpoint")
    reasons += compare_shapes(shapes_in_transformers(model), folder.tensors.shapes)
    n_compared, untouched = 0, {name for name in source.tensors if name not in source.left_out}
    for weight in by_layer([] if reasons else folder.weights(), "verifying"):
        for name, tensor in weight.to_ours(folder.tensors).items():
            if name not in untouched:
                reasons.append(f"{name} is not in {source.step}, or twice in the model")
                continue
            untouched.remove(name)
            expected = cast(source.tensors[name], name, source.dtype, name in source.state)
            reasons += compare_values(name, tensor, expected)
            n_compared += 1
    reasons += [] if reasons else [f"{name} of {source.step} is nowhere in the model" for name in sorted(untouched)]
    if not reasons and has_file(source.step, "tokenizer.json"):
        reasons += compare_tokenizers(source, model)
    raise_if(model, reasons)
    return n_compared


def raise_if(folder: Path, reasons: list[str]) -> None:
    if reasons:
        raise HubError(f"{folder} does not hold the model that it was made from", reasons)


def compare_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    reasons = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    reasons += [f"{name} is not expected" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return reasons + [
        f"{name} has the shape {found[name]}, not {expected[name]}" for name in both if found[name] != expected[name]
    ]


def compare_values(name: str, found: Tensor, expected: Tensor) -> list[str]:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        pairs = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (found, expected)]
        return [f"{name} is {pairs[0]}, not {pairs[1]}"]
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    if torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits)):
        return []
    return [f"{name} is all zero, its source is not" if not found.any() else f"{name} differs from its source"]


def shapes_in_transformers(model: Path) -> dict[str, tuple[int, ...]]:
    """What transformers would save for this config.json, by its own account: built without memory, tied tensors left
    out, its conversion to the layout of files applied."""
    auto = transformers("models.auto")
    loading = transformers("core_model_loading")
    revert: Callable[..., dict[str, Tensor]] = loading.revert_weight_conversion
    config = auto.AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        empty = auto.AutoModelForCausalLM.from_config(config)
    state = {name: tensor for name, tensor in empty.state_dict().items() if name not in empty.all_tied_weights_keys}
    return {name: tuple(tensor.shape) for name, tensor in revert(empty, state).items()}


def compare_tokenizers(source: Export, model: Path) -> list[str]:
    """Whether transformers feeds the model the ids that `moelm.generate` does."""
    config = source.config.data.corpus.tokenizer
    ours = read_tokenizer(source.step / "tokenizer.json")
    theirs = transformers("models.auto").AutoTokenizer.from_pretrained(model, local_files_only=True)
    reasons = []
    for text in (*PROBES, config.end_of_text):
        expected, found = encode_prompt(ours, config, text), theirs(text).input_ids
        if expected != found:
            reasons.append(f"the tokenizer makes {found[:8]} of {text!r}, moelm.generate {expected[:8]}")
    return reasons

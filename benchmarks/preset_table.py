"""The README's table of presets: published sizes, ours, and how far each is from the code in transformers.

    python benchmarks/preset_table.py            prints it
    python benchmarks/preset_table.py --write    puts it into README.md, between its two marks

Sizes are counted from `configs/full/X.yaml`; what is published, and where, stands in the first lines of that file. The
distance to that code is measured on `configs/mini/X.yaml`, which keeps every choice of the full model: random
weights, large enough that the logits' standard deviation is at least 1, exported to the model's class in transformers;
both read the same 2 x 96 tokens in float32 on the CPU. KL (nats, mean) and log p are those of the next token; the
gradient is that of the cross-entropy by all weights together, the difference a relative L2 norm.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.command_line import import_builtins
from moelm.config import ModelConfig, load_config
from moelm.hub import HubError, to_transformers, write_config
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.model.size import model_size

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- presets: python benchmarks/preset_table.py --write -->", "<!-- /presets -->"
WITHOUT_A_CLASS = ("deepseek_moe_16b",)  # tests/hub/test_deepseek_v1_parity.py compares it otherwise
HEADER = [
    *("preset", "who and where", "published", "total, B", "active, B", "without input embedding", "without both"),
    *("class in transformers", "KL", "max \\|Δ log p\\|", "gradient"),
]


class Parity(NamedTuple):
    class_name: str
    kl: float  # nats, mean over positions
    log_probability: float  # largest absolute difference
    gradient: float  # relative L2 difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    arguments = parser.parse_args()
    import_builtins()
    table = as_markdown([row(file) for file in sorted((ROOT / "configs/full").glob("*.yaml"))])
    print(table)
    if arguments.write:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def row(full: Path) -> list[str]:
    mini = full.parent.parent / "mini" / full.name
    parity = measure_parity(full.stem, load_config(mini).model)
    measured = ["none", "-", "-", "-"]
    if parity is not None:
        differences = parity.kl, parity.log_probability, parity.gradient
        measured = [parity.class_name, *(f"{difference:.0e}" for difference in differences)]
    return [*described(full), *measured]


def described(full: Path) -> list[str]:
    """The cells that the file alone gives."""
    name, source, published = header_of(full)
    return [f"[{name}](configs/full/{full.name})", source, published, *sizes(full)]


def header_of(full: Path) -> tuple[str, str, str]:
    """(the model, who published it and where, the published sizes) out of the two lines that a full preset begins with:
    `# NAME (WHO, WHERE): what it is.` and `# Published SIZES.`"""
    first, second, *_ = full.read_text(encoding="utf-8").splitlines()
    named = re.fullmatch(r"# (.+?) \((.+?)\): .+", first)
    published = re.fullmatch(r"# Published (.+)\.", second)
    assert named, f"{full}: {first}"
    assert published, f"{full}: {second}"
    source = re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", named[2])
    return named[1], source, published[1]


def sizes(full: Path) -> list[str]:
    size = model_size(load_config(full).model)
    counts = size.total, size.active, size.active_no_input_embedding, size.active_no_embeddings
    return [f"{count / 1e9:.3f}" for count in counts]


def measure_parity(name: str, config: ModelConfig) -> Parity | None:
    """None for the one model that no class of transformers expresses. Raises HubError for any other."""
    try:
        architecture, _ = write_config(config)
    except HubError:
        if name in WITHOUT_A_CLASS:
            return None
        raise
    gpt = random_model(config)
    theirs = to_transformers(gpt, config)
    theirs.set_attn_implementation("eager")
    tokens_BL = torch.randint(config.vocab_size, (2, 97), generator=torch.Generator().manual_seed(1))
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    wanted_BLV, logits_BLV = theirs(inputs_BL).logits, gpt(inputs_BL).logits
    assert wanted_BLV.std() >= 1, f"logits of standard deviation {wanted_BLV.std():.2f} hide differences"
    F.cross_entropy(wanted_BLV.flatten(0, 1), targets_BL.flatten()).backward()
    gpt(inputs_BL, targets_BL).loss.backward()
    wanted, result = (logits.detach().double().log_softmax(-1) for logits in (wanted_BLV, logits_BLV))
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters() if parameter.grad is not None}
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    wanted_gradients: dict[str, Tensor] = {}
    for weight in architecture.weights(config, fused=True):
        if not weight.ours[0].endswith("expert_bias"):
            wanted_gradients |= weight.to_ours(their_gradients)
    assert wanted_gradients.keys() == gradients.keys()
    difference = sum((gradients[name] - wanted).square().sum().item() for name, wanted in wanted_gradients.items())
    norm = sum(wanted.square().sum().item() for wanted in wanted_gradients.values())
    return Parity(
        class_name=architecture.class_name,
        kl=(wanted.exp() * (wanted - result)).sum(-1).mean().abs().item(),
        log_probability=(wanted - result).abs().max().item(),
        gradient=(difference / norm) ** 0.5,
    )


@torch.no_grad()
def random_model(config: ModelConfig) -> GPT:
    """Matrices that keep the size of what they multiply; norms, biases and sinks away from their initial values."""
    model = GPT(config)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise: Any = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.add_(0.2 * noise)
        elif name.endswith("expert_bias"):
            tensor.copy_(0.1 * noise)
        elif tensor.ndim < 2 or name.endswith("bias"):
            tensor.copy_(0.3 * noise)
        elif name == "embedding.weight":
            tensor.copy_((0.3 if config.tied_embeddings else 1.0) * noise)
        else:
            fan_in = tensor.shape[1]  # also of stacked experts, [E, in, out]
            tensor.copy_(1.5 * noise / fan_in**0.5)
    return model


def as_markdown(rows: list[list[str]]) -> str:
    alignment = [*["---"] * 3, *["---:"] * 4, "---", *["---:"] * 3]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADER, alignment, *rows))


if __name__ == "__main__":
    main()

"""python -m moelm.info --config F: what a model costs, without building more than its shapes."""

from __future__ import annotations

import json
from typing import Any

from moelm import command_line
from moelm.config import Config, load_config
from moelm.model.devices import on_devices
from moelm.model.size import expert_combinations, flops_per_token, model_size, short_name, training_memory

EPILOG = """example:
  python -m moelm.info --config configs/quickstart.yaml
  python -m moelm.info --config configs/quickstart.yaml model.moe.n_experts=64 --json
  python -m moelm.info --config configs/full/olmoe_1b_7b.yaml trainer.devices=8
"""


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.info",
        "Parameters, operations a token and memory of a config's model, from its shapes alone.",
        EPILOG,
    )
    parser.add_argument("--config", required=True, metavar="F")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", action="store_true")
    arguments = command_line.parse(parser, argv)
    config = load_config(arguments.config, arguments.overrides)
    facts = info(config)
    print(json.dumps(facts, indent=1) if arguments.json else as_table(config, facts))


def info(config: Config) -> dict[str, Any]:
    """Counts, floating-point operations, and GiB on one device for one micro-batch under DDP or on one device; where
    trainer.devices says how many there are, also what each holds and sends by strategy."""
    model, moe = config.model, config.model.moe
    size, memory = model_size(model), training_memory(config)
    return {
        "name": short_name(size),
        "total_params": size.total,
        "active_params": size.active,
        "active_params_no_input_embedding": size.active_no_input_embedding,
        "active_params_no_embeddings": size.active_no_embeddings,
        "multi_token_prediction_params": size.multi_token_prediction,
        "flops_per_token": flops_per_token(model, config.data.seq_len),
        "memory_gib": memory.total / 2**30,
        "memory_parts_gib": {
            part: getattr(memory, part) / 2**30
            for part in ("weights", "gradients", "optimizer", "activations", "working")
        },
        "gradients_beside_activations": memory.accumulates,
        "n_devices": n_devices(config),
        "on_devices": _on_devices(config),
        "moe_layers": model.moe_layers,
        "expert_combinations": expert_combinations(model),
        "d_expert_ratio": moe and moe.d_expert / model.d_model,
        "active_expert_ratio": moe and moe.top_k * moe.d_expert / model.d_model,
    }


def n_devices(config: Config) -> int:
    """As many as the config names; 1 where only the machine knows."""
    devices = config.trainer.devices
    if isinstance(devices, list):
        return len(devices) * config.trainer.num_nodes
    return devices * config.trainer.num_nodes if isinstance(devices, int) and devices > 0 else 1


def _on_devices(config: Config) -> list[dict[str, Any]]:
    found = on_devices(config, n_devices(config)) if n_devices(config) > 1 else []
    return [
        {"strategy": each.strategy, "memory_gib": each.memory / 2**30, "sent_gib_per_step": each.sent / 2**30}
        for each in found
    ]


def as_table(config: Config, facts: dict[str, Any]) -> str:
    model, moe, memory = config.model, config.model.moe, facts["memory_parts_gib"]
    rows = [
        ("model", facts["name"]),
        ("total parameters", f"{facts['total_params']:,}"),
        ("active parameters", f"{facts['active_params']:,}"),
        ("  without the input embedding", f"{facts['active_params_no_input_embedding']:,}"),
        ("  without input embedding and head", f"{facts['active_params_no_embeddings']:,}"),
        *_multi_token_prediction_row(config, facts),
        ("training FLOPs a token", f"{facts['flops_per_token']:,} (sequence length {config.data.seq_len})"),
        (
            "memory on one device",
            f"{facts['memory_gib']:.2f} GiB: "
            + ", ".join(f"{part} {value:.2f}" for part, value in memory.items())
            + ("" if facts["gradients_beside_activations"] else "; gradients come as activations go")
            + f" ({config.trainer.precision}, micro-batch {config.optim.micro_batch_size} x {config.data.seq_len})",
        ),
        *(
            (
                f"on {facts['n_devices']} devices, {each['strategy']}",
                f"{each['memory_gib']:.2f} GiB on each; each sends {each['sent_gib_per_step']:.2f} GiB a step",
            )
            for each in facts["on_devices"]
        ),
        ("layers", f"{model.n_layers}, of which {len(facts['moe_layers'])} with experts"),
    ]
    if moe is not None:
        n, k = moe.n_experts, moe.top_k
        rows += [
            ("d_expert / d_model", f"{facts['d_expert_ratio']:.3f}"),
            ("top_k x d_expert / d_model", f"{facts['active_expert_ratio']:.3f}"),
            ("expert combinations a token", f"C({n},{k}) = {_count(facts['expert_combinations'])}"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _multi_token_prediction_row(config: Config, facts: dict[str, Any]) -> list[tuple[str, str]]:
    count, n_modules = facts["multi_token_prediction_params"], config.model.n_prediction_modules
    text = f"{count:,} in {n_modules} module{'s' if n_modules > 1 else ''}, not counted above"
    return [("multi-token prediction", text)] if n_modules else []


def _count(value: int) -> str:
    return f"{value:,}" if value < 10**6 else f"{value:.1e}"


if __name__ == "__main__":
    command_line.run(main)

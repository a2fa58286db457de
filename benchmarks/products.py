"""The products of one MoE layer one by one, each with what moelm computes in it.

`moelm`: the kernels of `moe/kernels/hopper.py`. `torch`: torch's grouped product with the kernels that it needs around
it, which moelm takes where those cannot be used. `dense`: cuBLAS's product of the same size alone, one expert's weights
for all rows. The first two are timed only if they agree with float32 products, expert by expert.

Operations are those of the products; gradients of weights are bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import measure
import moe_layer
import torch
import torch.nn.functional as F
from measure import relative_error
from peers import Shape
from torch import Tensor

from moelm.moe.kernels import expert_mlp, products, rows
from moelm.moe.kernels.sorting import sort_by_expert

MOST = 0.01  # of relative errors; bf16 rounds 0.004 off
Results = tuple[Tensor, ...]


class Part(NamedTuple):
    operations: int
    wanted: Callable[[], Results]
    variants: dict[str, Callable[[], Results]]


def parts_of(shape: Shape, device: str) -> dict[str, Part]:
    """With balanced choices, in the order in which a layer computes them. `moelm` is missing where it is not used."""
    problem = moe_layer.make_problem(shape, moe_layer.make_weights(shape, device))
    x_TD, grad_TD, (_, D, _, K, F_) = problem.x_TD, problem.grad_TD, shape
    ids_TK = (x_TD.float() @ problem.weights["router"].float().T).topk(K).indices
    places_TK, choice_R, ends_E = sort_by_expert(ids_TK, shape.E)
    gates_TK = torch.rand(ids_TK.shape, device=device) + 0.5
    w1, w2 = torch.cat([problem.weights["gate"], problem.weights["up"]], 2), problem.weights["down"]
    token_R, R = choice_R // K, choice_R.shape[0]
    product, sums = expert_mlp._product, expert_mlp._sum_of_products
    # what a part gets from the one before, so that errors do not add up
    z = product(x_TD[token_R], w1, ends_E).bfloat16()
    h = rows.swiglu_reference(z, ends_E).bfloat16()
    backward = partial(rows.swiglu_backward_reference, product(grad_TD[token_R], w2.mT, ends_E))
    grad_z, gated_h, _ = (each.bfloat16() for each in backward(z, gates_TK, choice_R, ends_E))
    grouped = partial(F.grouped_mm, offs=ends_E)
    spread_x, spread_grad = (partial(rows.spread, each, places_TK) for each in (x_TD, grad_TD))

    def up() -> Results:
        found = grouped(spread_x(), w1)
        return found, rows.swiglu(found, ends_E)

    def down_backward() -> Results:
        return rows.swiglu_backward(grouped(spread_grad(), w2.mT), z, gates_TK, choice_R, ends_E)

    # operations of R D F multiply-adds; float32 results; torch's; what a dense product multiplies
    plain: dict[str, tuple[int, Callable[[], Results], Callable[[], Results], tuple[Tensor, Tensor]]] = {
        "gate and up, SwiGLU": (
            4,
            lambda: (found := product(x_TD[token_R], w1, ends_E), rows.swiglu_reference(found, ends_E)),
            up,
            (x_TD[token_R], w1[0]),
        ),
        "down": (2, lambda: (product(h, w2, ends_E),), lambda: (grouped(h, w2),), (h, w2[0])),
        "gradient of h, SwiGLU backward": (
            2,
            lambda: backward(z, gates_TK, choice_R, ends_E),
            down_backward,
            (grad_TD[token_R], w2[0].T),
        ),
        "gradient of down": (
            2,
            lambda: (sums(gated_h, grad_TD[token_R], ends_E),),
            lambda: (grouped(gated_h.mT, spread_grad()),),
            (gated_h.T, grad_TD[token_R]),
        ),
        "gradient of gate and up": (
            4,
            lambda: (sums(x_TD[token_R], grad_z, ends_E),),
            lambda: (grouped(spread_x().mT, grad_z),),
            (x_TD[token_R].T, grad_z),
        ),
        "gradient of the rows": (
            4,
            lambda: (product(grad_z, w1.mT, ends_E),),
            lambda: (grouped(grad_z, w1.mT),),
            (grad_z, w1[0].T),
        ),
    }
    parts = {
        name: Part(factor * R * D * F_, wanted, {"torch": by_torch, "dense": partial(_dense, *factors)})
        for name, (factor, wanted, by_torch, factors) in plain.items()
    }
    tiles = products.hopper_tiles(x_TD, R, K, F_, ends_E, torch.bfloat16)
    if tiles is not None:
        ours, by_token = products.hopper(), (choice_R, K, ends_E, tiles[0], torch.bfloat16, None)
        # where experts are wide the tokens are spread first; the layer does so once for the gradients of h and of down
        wide_x, wide_grad = (partial(products.spread_if_wide, each, places_TK, F_) for each in (x_TD, grad_TD))
        fused: list[Callable[[], Results]] = [
            lambda: ours.up_product(x_TD, choice_R, K, w1, tiles, wide_x()),
            lambda: (ours.product(h, w2, tiles[0]),),
            lambda: ours.down_backward(grad_TD, gates_TK, choice_R, ends_E, w2, z, tiles, wide_grad()),
            lambda: (ours.weight_gradient(grad_TD, gated_h, *by_token, wide_grad(), rows_first=True),),
            lambda: (ours.weight_gradient(x_TD, grad_z, *by_token, wide_x()),),
            lambda: (ours.product(grad_z, w1, tiles[0], transposed=True),),
        ]
        for part, run in zip(parts.values(), fused, strict=True):
            part.variants["moelm"] = run
    return parts


def _dense(a: Tensor, b: Tensor) -> Results:
    return (a @ b,)


def measure_shape(shape: Shape, device: str, rounds: int, burst_ms: float) -> dict[str, dict[str, Any]]:
    """By part its operations, and by variant ms, TFLOP/s and the largest relative error, or `error`."""
    result: dict[str, dict[str, Any]] = {}
    for name, part in parts_of(shape, device).items():
        found: dict[str, Any] = {variant: {} for variant in part.variants}
        wanted = part.wanted()
        for variant, run in part.variants.items():
            if variant == "dense":
                continue
            errors = [relative_error(one, other)["all"] for one, other in zip(run(), wanted, strict=True)]
            found[variant]["relative_error"] = max(errors)
            if not max(errors) <= MOST:
                found[variant]["error"] = f"relative error {max(errors):.1e}"
        del wanted
        right = {variant: run for variant, run in part.variants.items() if "error" not in found[variant]}
        for variant, samples in measure.time_interleaved(right, rounds, burst_ms).items():
            ms = found[variant]["ms"] = measure.spread_of(samples)
            found[variant]["tflops"] = part.operations / ms["median"] / 1e9
        result[name] = {"operations": part.operations, "variants": found}
        print(f"  {name}", file=sys.stderr, flush=True)
    return result


def markdown(result: dict[str, Any]) -> str:
    parts = ["# The products of one MoE layer\n", measure.markdown_facts(result["facts"])]
    parts.append(
        "Median (quartiles) in ms of interleaved repeats, TFLOP/s behind it. `torch` has SwiGLU and what spreads the "
        "tokens over rows in it, as `moelm` does; `dense` has the product alone.\n"
    )
    for name, found in result["products"].items():
        parts.append(f"## {name}: {moe_layer.describe(result['shapes'][name])}\n")
        table = [
            [part, *(_cell(each["variants"].get(v)) for v in ("moelm", "torch", "dense"))]
            for part, each in found.items()
        ]
        parts.append(measure.markdown_table(["part", "moelm", "torch", "dense"], table))
    return "\n".join(parts)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return found.get("error") or f"{measure.number(found['ms'], '.3f')}, {found['tflops']:.0f}"


def main() -> None:
    parser = measure.make_parser(__doc__, "python benchmarks/products.py --shapes olmoe,mixtral --out PREFIX")
    parser.add_argument("--shapes", default=",".join(moe_layer.SHAPES), help=f"of {', '.join(moe_layer.SHAPES)}")
    arguments = parser.parse_args()
    shapes = measure.chosen(parser, arguments.shapes, moe_layer.SHAPES)
    measure.require_cuda()
    run(arguments, shapes, "cuda")


def run(arguments: argparse.Namespace, shapes: list[str], device: str) -> dict[str, Any]:
    rounds, burst_ms = (2, 20.0) if arguments.quick else (5, 50.0)
    result: dict[str, Any] = {"facts": measure.facts(), "shapes": {}, "products": {}}
    for name in shapes:
        shape = moe_layer.SHAPES[name]
        result["shapes"][name] = shape._asdict()
        print(f"{name}: {moe_layer.describe(shape._asdict())}", file=sys.stderr, flush=True)
        result["products"][name] = measure_shape(shape, device, rounds, burst_ms)
        measure.free_memory()
        measure.write(arguments.out, result, markdown(result))
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()

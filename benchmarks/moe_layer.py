"""One mixture-of-experts layer, forward + backward with router and permutation, beside the dense limit and the peers.

`limit` is the definition of fast: the same floating-point operations as two dense matrix products and a SwiGLU over
T x K rows. Every other variant has the same weights and tokens, and is timed only if its output and all gradients agree
with the `loop` backend in float64 at the same size. Scores have a gap between the K-th and the next, so that routers
that multiply in bf16 choose the same experts as those in float32.

Saved activations: growth of the allocated memory over the forward pass, input and output not counted. TFLOP/s: of the
experts' matrix products, 18 T K D F. Times are those of `measure.time_interleaved`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import measure
import peers
import torch
import torch.nn.functional as F
from measure import relative_error
from peers import Layer, Shape
from torch import Tensor, nn

from moelm import command_line
from moelm.config import ModelConfig, UserError, check_model, from_dict
from moelm.moe.layer import MoELayer
from moelm.moe.types import RouteContext

SHAPES = {
    "olmoe": Shape(T=32768, D=2048, E=64, K=8, F=1024),
    "qwen3": Shape(T=32768, D=2048, E=128, K=8, F=768),
    "mixtral": Shape(T=16384, D=4096, E=8, K=2, F=14336),
    "small": Shape(T=16384, D=512, E=64, K=8, F=256),
}
SEQ_LEN = 2048
LIMITS = {"all": 0.02, "worst": 0.1}  # of relative errors in bf16; what is wrong is wrong by far more
MAX_FLOAT64 = 1.5e9  # weights of a reference in float64: with their gradients three times 12 GB
ROUTER_LIMITS = {"all": 0.05, "worst": 0.25}  # its gradient is a small difference of large numbers

# ---------------------------------------------------------------------------------------------- problem


class Problem(NamedTuple):
    """Tokens, their gradient and the weights, all bfloat16, so that every variant computes with the same numbers."""

    shape: Shape
    x_TD: Tensor
    grad_TD: Tensor
    weights: dict[str, Tensor]  # router [E, D], gate and up [E, D, F], down [E, F, D]


def make_weights(shape: Shape, device: str) -> dict[str, Tensor]:
    """bfloat16 router [E, D], orthonormal rows; gate and up [E, D, F], down [E, F, D], normal(0, 0.02)."""
    _, D, E, _, F_ = shape
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    sizes = {"gate": (E, D, F_), "up": (E, D, F_), "down": (E, F_, D)}
    experts = {name: normal(*size, dtype=torch.bfloat16) * 0.02 for name, size in sizes.items()}
    return {"router": torch.linalg.qr(normal(D, E)).Q.T.bfloat16(), **experts}


def make_problem(shape: Shape, weights: dict[str, Tensor], load: str = "balanced") -> Problem:
    """Tokens x = noise + sum_e s_e q_e with the router's rows q_e, so token t's logits are the s_t that `wanted_logits`
    draws."""
    router_ED = weights["router"].float()
    generator = torch.Generator(router_ED.device).manual_seed(1)
    noise_TD = 0.5 * torch.randn(shape.T, shape.D, generator=generator, device=router_ED.device)
    x_TD = noise_TD + (wanted_logits(shape, load, generator) - noise_TD @ router_ED.T) @ router_ED
    grad_TD = torch.randn(shape.T, shape.D, generator=generator, device=router_ED.device)
    return Problem(shape, x_TD.bfloat16(), grad_TD.bfloat16(), weights)


LOADS = {
    "balanced": "every choice equally likely",
    "one": "expert 0 is among the choices of every token",
    "same": "all tokens choose the same K experts",
    "half": "half of the experts idle",
    "single": "expert 0 has one token",
}


def wanted_logits(shape: Shape, load: str, generator: torch.Generator) -> Tensor:
    """float32 [T, E]: 2 to 3 for the K experts of a token, drawn as `load` says, at most 0.75 for the others."""
    T, _, E, K, _ = shape
    preference_TE = torch.rand(T, E, generator=generator, device=generator.device)
    if load == "one":
        preference_TE[:, 0] += 1
    elif load == "same":
        preference_TE[:, :K] += 1
    elif load == "half":
        preference_TE[:, max(K, E // 2) :] -= 1
    elif load == "single":
        preference_TE[1:, 0] -= 1
        preference_TE[0, 0] += 1
    chosen_TK = preference_TE.topk(K, dim=-1).indices
    others_TE = torch.randn(T, E, generator=generator, device=generator.device).mul(0.25).clamp(-0.75, 0.75)
    return others_TE.scatter(1, chosen_TK, 2 + torch.rand(T, K, generator=generator, device=generator.device))


# --------------------------------------------------------------------------------------------- variants


def moelm_layer(
    shape: Shape,
    backend: str,
    weights: str = "fp32",
    compiled: bool = True,
    short_gradients: bool = False,
    graphs: bool = False,
) -> Layer:
    """`weights` fp32: as moelm trains, float32 masters under bf16 autocast; bf16: as the peers have them; else float32
    without autocast. `short_gradients`: those of experts bf16, as where a step has one micro-batch. `graphs`: each pass
    is launched as one CUDA graph."""
    section = {
        "d_model": shape.D,
        "moe": {
            "n_experts": shape.E,
            "top_k": shape.K,
            "d_expert": shape.F,
            "router": {"name": "top_k", "normalize_gates": "after_top_k"},
            "experts": {"backend": backend},
        },
    }
    model = from_dict(ModelConfig, section)
    check_model(model)
    assert model.moe is not None
    layer = MoELayer(model.moe, shape.D, None)
    if weights == "bf16":
        layer = layer.bfloat16()
    if compiled:
        torch._functorch.config.backward_pass_autocast = "off"  # as GPT.compile_blocks does with the block around it
        layer.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
    if short_gradients:
        layer.experts.gate_up.grad_dtype = layer.experts.down.grad_dtype = torch.bfloat16

    def run(x_TD: Tensor) -> Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        x_BLD = x_TD.view(-1, min(SEQ_LEN, x_TD.shape[0]), shape.D)
        context = RouteContext(_token_ids(*x_BLD.shape[:2], x_TD.device), None, True)
        with torch.autocast(x_TD.device.type, torch.bfloat16, enabled=weights == "fp32"):
            layer.experts.refresh()  # as GPT does
            y_BLD: Tensor = layer(x_BLD, context)[0]
        return y_BLD.flatten(0, 1)

    gate_up, down = layer.experts.gate_up, layer.experts.down
    return Layer(
        run,
        layer,
        lambda of: {
            "router": of(layer.router.weight),
            "gate": of(gate_up)[..., : shape.F],
            "up": of(gate_up)[..., shape.F :],
            "down": of(down),
        },
        ("fp32, bf16 compute" if weights == "fp32" else weights) + (" and gradients" if short_gradients else ""),
    )


@cache
def _token_ids(n_sequences: int, length: int, device: torch.device) -> Tensor:
    """int64 [B, L]; the router looks only at their shape."""
    return torch.zeros(n_sequences, length, dtype=torch.int64, device=device)


class Dense(nn.Module):
    """The limit: the experts' operations on T x K rows as plain products, one expert's weights for all."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(shape.D, 2 * shape.F) * 0.02)
        self.down = nn.Parameter(torch.randn(shape.F, shape.D) * 0.02)

    def forward(self, rows_RD: Tensor) -> Tensor:
        gate_RF, up_RF = (rows_RD @ self.gate_up).chunk(2, -1)
        return (F.silu(gate_RF) * up_RF) @ self.down


def dense(shape: Shape, compiled: bool) -> Layer:
    module = Dense(shape).bfloat16()
    run = torch.compile(module, dynamic=False) if compiled else module
    return Layer(run, module, None, "bf16")


def products(shape: Shape) -> Callable[[], None]:
    """The six matrix products of `Dense` alone, forward and backward, outputs allocated beforehand."""
    R, D, F_ = shape.T * shape.K, shape.D, shape.F
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, gate_up, hidden, w1, w2 = make(R, D), make(R, 2 * F_), make(R, F_), make(D, 2 * F_), make(F_, D)
    y, grad_w1, grad_w2 = torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2)

    def step() -> None:
        torch.mm(x, w1, out=gate_up)
        torch.mm(hidden, w2, out=y)
        torch.mm(x, w2.T, out=hidden)
        torch.mm(hidden.T, x, out=grad_w2)
        torch.mm(gate_up, w1.T, out=y)
        torch.mm(x.T, gate_up, out=grad_w1)

    return step


VARIANTS: dict[str, Callable[[Shape], Layer]] = {
    "limit": partial(dense, compiled=False),
    "limit compiled": partial(dense, compiled=True),
    "moelm fused": partial(moelm_layer, backend="fused"),
    "moelm fused bf16 gradients": partial(moelm_layer, backend="fused", short_gradients=True),
    "moelm fused graphs": partial(moelm_layer, backend="fused", graphs=True),
    "moelm fused bf16": partial(moelm_layer, backend="fused", weights="bf16"),
    "moelm grouped": partial(moelm_layer, backend="grouped"),
    "plain grouped_mm compiled": partial(peers.plain_grouped, compiled=True),
    "transformers": partial(peers.transformers_layer, compiled=False),
    "transformers compiled": partial(peers.transformers_layer, compiled=True),
    "torchtitan": partial(peers.torchtitan_layer, compiled=False),
    "torchtitan compiled": partial(peers.torchtitan_layer, compiled=True),
    "scattermoe": partial(peers.scattermoe_layer, compiled=False),
    "sonicmoe": partial(peers.sonicmoe_layer, tuned=False),
    "sonicmoe tuned": partial(peers.sonicmoe_layer, tuned=True),  # takes minutes for each shape
}
DEFAULT = [name for name in VARIANTS if name != "sonicmoe tuned"]

# ---------------------------------------------------------------------------------------------- measure


def reference(problem: Problem, tokens_at_once: int = 4096) -> dict[str, Tensor]:
    """Output and all gradients by the `loop` backend in float64 (float32 where that would not fit; the router's own
    arithmetic is float32), as float32. Some tokens at a time, since tokens do not meet in it."""
    n_weights = sum(weight.numel() for weight in problem.weights.values())
    dtype = torch.float64 if n_weights < MAX_FLOAT64 else torch.float32
    device = problem.x_TD.device
    with torch.device(device):
        layer = moelm_layer(problem.shape, "loop", "reference", compiled=False)
    layer.module.to(dtype)
    layer.load(problem.weights)
    y, grad_x = [], []
    for x_TD, grad_TD in zip(problem.x_TD.split(tokens_at_once), problem.grad_TD.split(tokens_at_once), strict=True):
        x_TD = x_TD.to(dtype).requires_grad_()
        y_TD = layer.run(x_TD)
        y_TD.backward(grad_TD.to(dtype))
        y.append(y_TD.detach().float())
        assert x_TD.grad is not None
        grad_x.append(x_TD.grad.float())
    return {"y": torch.cat(y), "x": torch.cat(grad_x), **{k: v.float() for k, v in layer.gradients().items()}}


def forward_backward(layer: Layer, x_TD: Tensor, grad_TD: Tensor) -> Tensor:
    """y; gradients are made anew, not added, and stay."""
    drop_gradients(layer, x_TD)
    y_TD = layer.run(x_TD)
    y_TD.backward(grad_TD)
    return y_TD.detach()


def timed_step(layer: Layer, x_TD: Tensor, grad_TD: Tensor) -> None:
    """The same, leaving no memory behind for the other variants to miss."""
    layer.run(x_TD).backward(grad_TD)
    drop_gradients(layer, x_TD)


def drop_gradients(layer: Layer, x_TD: Tensor) -> None:
    x_TD.grad = None
    layer.module.zero_grad(set_to_none=True)


def check(layer: Layer, problem: Problem, wanted: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Relative errors of output and gradients. Raises WrongError where one is over its limit, or NaN."""
    x_TD = problem.x_TD.clone().requires_grad_()
    y_TD = forward_backward(layer, x_TD, problem.grad_TD)
    assert x_TD.grad is not None
    found = {"y": y_TD, "x": x_TD.grad, **layer.gradients()}
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    drop_gradients(layer, x_TD)
    for name, error in errors.items():
        limits = ROUTER_LIMITS if name == "router" else LIMITS
        if any(not error[kind] <= limits[kind] for kind in limits):
            raise WrongError(f"relative error of {name} {error['all']:.1e}, worst row {error['worst']:.1e}")
    return errors


class WrongError(Exception):
    """A variant computes something else."""


def build(name: str, problem: Problem) -> Layer:
    """On the problem's device, with its weights."""
    with torch.device(problem.x_TD.device):
        layer = VARIANTS[name](problem.shape)
    layer.load(problem.weights)
    return layer


def saved_gib(layer: Layer, x_TD: Tensor, grad_TD: Tensor) -> float | None:
    """None: of CUDA graphs, whose memory stays allocated."""
    if not x_TD.is_cuda:
        return 0.0
    timed_step(layer, x_TD, grad_TD)
    before = torch.cuda.memory_allocated()
    y_TD = layer.run(x_TD)
    growth = (torch.cuda.memory_allocated() - before - y_TD.numel() * y_TD.element_size()) / 2**30
    return growth if growth >= 0 else None


def measure_shape(shape: Shape, names: list[str], device: str, rounds: int, burst_ms: float) -> dict[str, Any]:
    """By variant: `error` or ms, TFLOP/s, the limit's time over its own, saved GiB, relative errors."""
    problem = make_problem(shape, make_weights(shape, device))
    x_TD = problem.x_TD.clone().requires_grad_()
    rows = [tensor.repeat(shape.K, 1) for tensor in (problem.x_TD, problem.grad_TD)]
    rows[0].requires_grad_()
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    wanted = reference(problem)
    measure.free_memory()
    for name in names:
        try:
            layer = build(name, problem)
            inputs = (x_TD, problem.grad_TD) if layer.views else rows
            errors = check(layer, problem, wanted) if layer.views else {}
            found[name] = {"weights": layer.weights, "saved_gib": saved_gib(layer, *inputs), "errors": errors}
            steps[name] = partial(timed_step, layer, *inputs)
            steps[name]()
        except Exception as error:
            found[name] = {"error": explain(error)}
            steps.pop(name, None)
        layer = None  # memory of one that failed
        x_TD.grad = rows[0].grad = None
        print(f"  {name}: {say(found[name])}", file=sys.stderr, flush=True)
    del wanted
    if device == "cuda":
        steps["matrix products alone"], found["matrix products alone"] = products(shape), {"weights": "bf16"}
    times = measure.time_interleaved(steps, rounds, burst_ms)
    for name, samples in times.items():
        found[name]["ms"] = measure.spread_of(samples)
        found[name]["tflops"] = shape.flops / found[name]["ms"]["median"] / 1e9
        if "limit" in times:
            found[name]["of_limit"] = measure.ratios(times["limit"], samples)
        print(f"  {name}: {found[name]['ms']['median']:.3f} ms", file=sys.stderr, flush=True)
    return found


def explain(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    if isinstance(error, WrongError):
        return f"FAILED: {error}"
    text = " ".join(str(error).split())[:300]
    return f"not available: {text}" if isinstance(error, UserError) else f"raised {type(error).__name__}: {text}"


def say(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    errors = ", ".join(f"{name} {error['all']:.1e}" for name, error in found["errors"].items())
    return f"saved {_gib(found['saved_gib'])} GiB; relative errors: {errors or '-'}"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def measure_repeatability(shape: Shape, name: str, device: str, n_repeats: int) -> str:
    """`n bitwise equal`, or what differed first."""
    problem = make_problem(shape, make_weights(shape, device))
    x_TD = problem.x_TD.clone().requires_grad_()
    first: dict[str, Tensor] = {}
    try:
        layer = build(name, problem)
        for i in range(n_repeats):
            y_TD = forward_backward(layer, x_TD, problem.grad_TD)
            assert x_TD.grad is not None
            values = {"y": y_TD, "x": x_TD.grad, **layer.gradients()}
            first = first or {key: value.clone() for key, value in values.items()}
            differing = [key for key, value in values.items() if not torch.equal(value, first[key])]
            if differing:
                return f"FAILED: repeat {i} differs in {', '.join(differing)}"
    except Exception as error:
        return explain(error)
    return f"{n_repeats} bitwise equal"


def measure_skew(shape: Shape, name: str, device: str, rounds: int, burst_ms: float) -> dict[str, Any]:
    """By load: errors, ms and the time over the balanced one; by `one token alone`: the error of a batch of one."""
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {}
    weights = make_weights(shape, device)
    problems = {load: make_problem(shape, weights, load) for load in LOADS}
    try:
        layer = build(name, problems["balanced"])
    except Exception as error:
        return {load: {"error": explain(error)} for load in LOADS}
    for load, problem in problems.items():
        try:
            found[load] = {"errors": check(layer, problem, reference(problem))}
            x_TD = problem.x_TD.clone().requires_grad_()
            steps[load] = partial(timed_step, layer, x_TD, problem.grad_TD)
        except Exception as error:
            found[load] = {"error": explain(error)}
    for load, samples in (times := measure.time_interleaved(steps, rounds, burst_ms)).items():
        found[load]["ms"] = measure.spread_of(samples)
        if "balanced" in times:
            found[load]["of_balanced"] = measure.ratios(samples, times["balanced"])
    whole = problems["balanced"]
    alone = Problem(shape._replace(T=1), whole.x_TD[:1], whole.grad_TD[:1], whole.weights)
    try:
        found["one token alone"] = {"errors": check(layer, alone, reference(alone))}
    except Exception as error:
        found["one token alone"] = {"error": explain(error)}
    return found


# ----------------------------------------------------------------------------------------------- report


def markdown(result: dict[str, Any]) -> str:
    parts = ["# One MoE layer, forward + backward\n", measure.markdown_facts(result["facts"])]
    parts.append(
        "Median (quartiles) of interleaved repeats in one process. `of the limit`: the limit's time over the "
        "variant's, in the same round. Saved: what the forward pass keeps, input and output not counted. Errors: "
        "relative L2 against the `loop` backend in higher precision, same size and weights.\n"
    )
    columns = ["variant", "weights", "ms", "TFLOP/s", "of the limit", "saved GiB"]
    columns += [f"error of {name}" for name in ("y", "x", "gate", "up", "down", "router")]
    for name, variants in result["layer"].items():
        parts.append(f"## {name}: {describe(result['shapes'][name])}\n")
        parts.append(measure.markdown_table(columns, [variant_row(*item) for item in variants.items()]))
        parts += [f"{variant}: {found['error']}\n" for variant, found in variants.items() if "error" in found]
    for name, variants in result.get("skew", {}).items():
        parts.append(f"## Skewed loads, {name}\n")
        rows = [skew_row(variant, *item) for variant, loads in variants.items() for item in loads.items()]
        parts.append(measure.markdown_table(["variant, load", "ms", "of balanced", "worst error"], rows))
        parts.append("; ".join(f"{load}: {meaning}" for load, meaning in LOADS.items()) + ".\n")
    for name, variants in result.get("repeatability", {}).items():
        parts.append(f"## Repeats, {name}\n")
        parts.append(markdown_pairs(variants))
    return "\n".join(parts)


def markdown_pairs(pairs: dict[str, str]) -> str:
    return "".join(f"- {name}: {text}\n" for name, text in pairs.items())


def describe(shape: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in shape.items())


def variant_row(name: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [name, *["-"] * 11]
    errors = found.get("errors", {})
    saved = _gib(found.get("saved_gib"))
    row = [name, found["weights"], measure.number(found["ms"]), f"{found['tflops']:.0f}"]
    row += [measure.number(found.get("of_limit"), ".3f"), saved]
    return (
        row
        + [f"{errors[key]['all']:.1e}" if key in errors else "-" for key in ("y", "x", "gate", "up", "down")]
        + [f"{errors['router']['all']:.1e}" if "router" in errors else "-"]
    )


def skew_row(variant: str, load: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"{variant}, {load}", "-", "-", found["error"]]
    worst = max(found["errors"], key=lambda name: found["errors"][name]["all"])
    return [
        f"{variant}, {load}",
        measure.number(found.get("ms")),
        measure.number(found.get("of_balanced"), ".3f"),
        f"{found['errors'][worst]['all']:.1e} ({worst})",
    ]


def main() -> None:
    parser = measure.make_parser(
        __doc__, "python benchmarks/moe_layer.py --shapes olmoe,small --variants limit,sonicmoe"
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--variants", default=",".join(DEFAULT), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--repeatability", action="store_true", help="20 repeats of moelm's variants, bitwise")
    parser.add_argument(
        "--skew", action="store_true", help="uneven loads: correct, and their time over the balanced one"
    )
    parser.add_argument("--no-time", action="store_true", help="only what the two options above add")
    arguments = parser.parse_args()
    shapes = measure.chosen(parser, arguments.shapes, SHAPES)
    names = measure.chosen(parser, arguments.variants, VARIANTS)
    measure.require_cuda()
    run(arguments, shapes, names, "cuda")


def run(arguments: argparse.Namespace, shapes: list[str], names: list[str], device: str) -> dict[str, Any]:
    command_line.import_builtins()
    measure.allow_recompiles()
    rounds, burst_ms, n_repeats = (2, 20.0, 3) if arguments.quick else (5, 150.0, 20)
    result: dict[str, Any] = {"facts": measure.facts(), "shapes": {}, "layer": {}, "skew": {}, "repeatability": {}}
    ours = [name for name in names if name.startswith("moelm")]
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        result["shapes"][shape_name] = shape._asdict()
        print(f"{shape_name}: {describe(shape._asdict())}", file=sys.stderr, flush=True)
        if not arguments.no_time:
            result["layer"][shape_name] = measure_shape(shape, names, device, rounds, burst_ms)
            measure.free_memory()
        for name in ours:
            if arguments.skew:
                found = measure_skew(shape, name, device, rounds, burst_ms)
                result["skew"].setdefault(shape_name, {})[name] = found
            if arguments.repeatability:
                found = measure_repeatability(shape, name, device, n_repeats)
                result["repeatability"].setdefault(shape_name, {})[name] = found
            measure.free_memory()
        measure.write(arguments.out, result, markdown(result))
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()

"""Variants of the grouped products that find their rows by token, and SwiGLU's backward by warps of its own, against what
hopper.py and rows.py do in several kernels. Run from the root: PYTHONPATH=$PWD python benchmarks/experiments/bench_gather.py
Environment: SHAPES=olmoe,step,small,qwen3,mixtral. One line a variant: ms, TFLOP/s, relative errors. ~20 s a shape."""
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
import torch, gather as G
from triton.testing import do_bench
from moelm.moe.kernels import hopper as H, products as P, rows as R, sorting as S
SHAPES = {"olmoe": (32768, 2048, 64, 8, 1024), "qwen3": (32768, 2048, 128, 8, 768), "mixtral": (16384, 4096, 8, 2, 14336), "small": (16384, 512, 64, 8, 256), "step": (16384, 1024, 64, 8, 512)}
rel = lambda a, b: float((a.float() - b.float()).norm() / b.float().norm())
def timed(name, flops, function, wanted=None):
    try:
        found = function(); torch.cuda.synchronize()
        errors = [f"{rel(a, b):.1e}" for a, b in zip(found, wanted)] if wanted else []
        del found
        ms = do_bench(function, warmup=20, rep=80, return_mode="median")
        print(f"{name:44} {ms:8.3f} ms {flops / ms / 1e9:5.0f} TF {errors}", flush=True)
    except Exception as error:
        print(f"{name:44} FAILED {error!r}"[:300], flush=True)
for shape in os.environ.get("SHAPES", "step,olmoe").split(","):
    T, D, E, K, F = SHAPES[shape]; flops = 2 * T * K * D * F
    torch.manual_seed(0); bf = dict(device="cuda", dtype=torch.bfloat16)
    x, dy = torch.randn(T, D, **bf), torch.randn(T, D, **bf)
    w1, w2 = torch.randn(E, D, 2 * F, **bf) * 0.02, torch.randn(E, F, D, **bf) * 0.02
    gates = torch.rand(T, K, device="cuda")
    row_of, choice, offs = S.sort_by_expert(torch.rand(T, E, device="cuda").topk(K).indices, E)
    rows, dyr = R.spread(x, row_of), R.spread(dy, row_of); tiles = P.row_tiles(rows, offs)
    assert tiles is not None, "hopper.py is not used: see the log line"
    up = lambda: P.up_product(R.spread(x, row_of), w1, offs, tiles)
    gu, h = up()
    timed(f"{shape} spread + up", 2 * flops, up)
    for group in (8, 16, 32):
        timed(f"{shape} gathered up, group {group}", 2 * flops, lambda: G.gathered_product(x, w1, tiles, choice, K, F, swiglu=True, group=group), (gu, h))
    back = lambda: R.swiglu_backward(P.product(dyr, w2, offs, tiles, transposed=True), gu, gates, choice, offs)
    ggu, gh, gg = back()
    timed(f"{shape} dh + swiglu_backward", flops, back)
    for gather in (False, True):
        for epilogue in (136, 112):
            timed(f"{shape} down_backward gather={gather} regs {epilogue}", flops, lambda: G.down_backward(dy if gather else dyr, w2, tiles, gu, gates, choice, K, gather, epilogue=epilogue), (ggu, gh, gg))
    timed(f"{shape} spread", flops, lambda: R.spread(x, row_of))
    dw1, dw2 = H.weight_gradient(rows, ggu, offs), H.weight_gradient(gh, dyr, offs)
    timed(f"{shape} dW1", 2 * flops, lambda: H.weight_gradient(rows, ggu, offs))
    timed(f"{shape} gathered dW1", 2 * flops, lambda: [G.gathered_gradient(x, ggu, choice, K, offs, True)], (dw1,))
    timed(f"{shape} dW2", flops, lambda: H.weight_gradient(gh, dyr, offs))
    timed(f"{shape} gathered dW2", flops, lambda: [G.gathered_gradient(gh, dy, choice, K, offs, False)], (dw2,))
    repeat = [G.gathered_product(x, w1, tiles, choice, K, F, swiglu=True)[0] for _ in range(3)]
    print(shape, "bitwise repeatable", all(torch.equal(each, repeat[0]) for each in repeat), flush=True)
    del x, dy, w1, w2, rows, dyr, gu, h, ggu, gh, gg, dw1, dw2, repeat; torch.cuda.empty_cache()

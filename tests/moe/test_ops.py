"""Functions as ops of PyTorch: gradients through them, compile around them, and a second import."""

import importlib
import inspect
import re
import warnings

import pytest
import torch

from moelm.moe import choice, fused
from moelm.moe.dispatch import dropless, expert_parallel
from moelm.moe.experts import grouped_mm
from moelm.moe.ops import op

OFFSETS_E = torch.tensor([3, 8], dtype=torch.int32)
PRODUCT = grouped_mm, (torch.randn(8, 16), torch.randn(2, 16, 8), OFFSETS_E)
SUM = dropless.sum_by_token, (torch.randn(8, 16), torch.arange(8) % 3, 3)


@pytest.mark.parametrize(("function", "inputs"), [PRODUCT, SUM], ids=["grouped_mm", "sum_by_token"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_function_with_an_op_inside_is_one_graph_and_has_its_gradients(function, inputs, backend):
    """What has no gradient of its own would only warn and cut the graph."""
    leaf, results = inputs[0].clone().requires_grad_(), []
    torch._dynamo.reset()
    for each in (function, torch.compile(function, backend=backend, fullgraph=True)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*autograd kernel.*")
            y = each(leaf, *inputs[1:])
            results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for eager, compiled in zip(*results, strict=True):
        assert eager.any()
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("module", [expert_parallel, fused, dropless, choice])
def test_what_depends_on_the_tokens_of_other_ranks_divides_a_cuda_graph(module):
    defined = re.findall(r"op\(\s*\"moelm::(\w+)\"", inspect.getsource(module))
    assert defined
    for name in defined:
        apart = torch.Tag.cudagraph_unsafe in getattr(torch.ops.moelm, name).default.tags
        travels = module is expert_parallel or name.endswith(("_arriving", "_leaving", "_around"))
        assert apart == travels, name


def test_a_second_derivative_that_does_not_exist_is_an_error():
    function, (x_RD, *others) = PRODUCT
    x_RD = x_RD.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x_RD, *others).square().sum(), x_RD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_op_stays_what_it_was_when_its_module_is_imported_again():
    kept = choice.keep_choice
    assert importlib.reload(choice).keep_choice is kept
    assert kept(OFFSETS_E).tolist() == [3, 8]


def test_compile_never_looks_into_an_op():
    seen = []

    @op("moelm::seen_by_a_test", fake=torch.empty_like)
    def see(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x.clone()

    @torch.compile(backend="eager")
    def loop(x):
        for _ in range(2):  # a graph that breaks in a loop is not compiled, so the op is called from Python
            x = see(x)
            print(end="")
        return x

    loop(torch.ones(2))
    assert seen == [False, False]

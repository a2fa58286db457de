"""The loss whose gradients are made in the forward pass, against plain PyTorch and float64."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.cross_entropy import IGNORE, MAX_FUSED_BYTES, FusedCrossEntropy, chunked_cross_entropy
from moelm.moe.kernels import INTERPRETED

pytest.importorskip("triton")

from moelm.model import cross_entropy_kernel as kernel

T, D, V = 13, 24, 150
DTYPES = [torch.float32, torch.bfloat16]
UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # one in the last place; the interpreter cuts off, a GPU rounds


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_targets(device):
    targets_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    targets_T[[0, 5, 6]] = IGNORE
    targets_T[[1, 2]] = torch.tensor([0, V - 1])
    return targets_T.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 256], ids=["many_blocks", "one_block"])
def test_the_kernel_is_its_reference(kernel_device, monkeypatch, dtype, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    logits_TV = random(T, V, scale=4.0).to(kernel_device, dtype)
    logits_TV[3, 7], logits_TV[4] = 300.0, -1000.0  # exp of either overflows or vanishes
    targets_T, scale = make_targets(kernel_device), torch.tensor(0.3, device=kernel_device)
    wanted_TV = logits_TV.clone()
    wanted_T = kernel.cross_entropy_reference_(wanted_TV, targets_T, scale, IGNORE)
    found_T = kernel.cross_entropy_(logits_TV, targets_T, scale, IGNORE)
    torch.testing.assert_close(found_T, wanted_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_TV, wanted_TV, rtol=UNIT[dtype], atol=1e-6)
    assert (logits_TV[targets_T == IGNORE] == 0).all()
    assert (found_T[targets_T == IGNORE] == 0).all()


def losses(function, dtype, x_TD, weight_VD, targets_T):
    """(loss, ce, gradients of x and of the weight); float32 parameters, and products in `dtype` under autocast."""
    x_TD, weight_VD = (tensor.clone().requires_grad_() for tensor in (x_TD, weight_VD))
    device = x_TD.device.type
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
        loss, ce_T = function(x_TD, weight_VD, targets_T)
    assert not ce_T.requires_grad
    (0.5 * loss).backward()
    return loss.detach(), ce_T, x_TD.grad, weight_VD.grad


def fused(max_bytes):
    return lambda *inputs: FusedCrossEntropy.apply(*inputs, max_bytes)


def plain(x_TD, weight_VD, targets_T):
    with torch.autocast(x_TD.device.type, enabled=False):
        ce_T = F.cross_entropy(x_TD @ weight_VD.T, targets_T, ignore_index=IGNORE, reduction="none")
        return ce_T.sum() / (targets_T != IGNORE).sum().clamp(min=1), ce_T.detach()


@pytest.mark.parametrize("max_bytes", [MAX_FUSED_BYTES, 4 * 4 * V, 1], ids=["whole", "chunks", "single_tokens"])
def test_in_float32_it_equals_the_plain_loss_in_any_chunks(kernel_device, max_bytes):
    inputs = random(T, D).to(kernel_device), random(V, D, seed=1).to(kernel_device), make_targets(kernel_device)
    wanted = losses(plain, torch.float32, *inputs)
    for value, expected in zip(losses(fused(max_bytes), torch.float32, *inputs), wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert (wanted[2][0] == 0).all()  # an ignored token


def test_under_autocast_it_is_as_near_to_float64_as_the_chunked_loss(kernel_device):
    x_TD = random(T, D).bfloat16().float().to(kernel_device)
    inputs = x_TD, random(V, D, seed=1).to(kernel_device), make_targets(kernel_device)
    exact = losses(plain, torch.float64, *(each.double() if each.is_floating_point() else each for each in inputs))

    def error(function):
        results = losses(function, torch.bfloat16, *inputs)
        assert [each.dtype for each in results] == [torch.float32] * 4
        return [float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]

    limit = 1.5 if INTERPRETED else 1.05  # the interpreter cuts off
    for found, other in zip(error(fused(4 * 2 * V)), error(recomputing), strict=True):
        assert found < max(limit * other, 1e-4)


def recomputing(x_TD, weight_VD, targets_T):
    """The other way of `chunked_cross_entropy`, on whatever device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moelm.model.cross_entropy.HAS_TRITON", False)
        return chunked_cross_entropy(x_TD, weight_VD, targets_T, 4 * V)


def test_several_losses_of_one_head_add_their_gradients(kernel_device):
    """As in multi-token prediction; and a loss without a single target is 0 and sends none."""
    weight_VD = random(V, D, seed=1).to(kernel_device)
    inputs = [(random(T, D, seed=i).to(kernel_device), make_targets(kernel_device)) for i in (3, 4)]
    inputs.append((inputs[0][0], torch.full_like(inputs[0][1], IGNORE)))
    gradients = []
    for function in (fused(4 * 4 * V), plain):
        weight = weight_VD.clone().requires_grad_()
        values = [function(x_TD, weight, targets_T)[0] for x_TD, targets_T in inputs]
        assert values[2] == 0
        (values[0] + 0.3 * values[1] + values[2]).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_the_logits_of_one_chunk_at_most_exist(kernel_device, monkeypatch):
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: sizes.append(linear(*args)) or sizes[-1])
    x_TD, weight_VD = random(T, D).to(kernel_device), random(V, D, seed=1).to(kernel_device)
    FusedCrossEntropy.apply(x_TD.requires_grad_(), weight_VD, make_targets(kernel_device), 4 * 5 * V)
    assert [len(logits) for logits in sizes] == [5, 5, 3]


@pytest.mark.gpu
def test_on_cuda_the_loss_is_the_fused_one_with_gradients_and_plain_without():
    x_TD, weight_VD, targets_T = random(T, D).cuda().requires_grad_(), random(V, D).cuda(), make_targets("cuda")
    loss, _ = chunked_cross_entropy(x_TD, weight_VD, targets_T)
    assert "FusedCrossEntropy" in type(loss.grad_fn).__name__
    with torch.no_grad():
        again, _ = chunked_cross_entropy(x_TD, weight_VD, targets_T)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)

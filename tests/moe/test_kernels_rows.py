"""The kernels around the grouped products against plain PyTorch. Without a GPU they run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from moelm.moe.kernels import rows
from moelm.moe.kernels.products import Here, row_tiles, row_tiles_reference
from moelm.moe.kernels.sorting import sort_by_expert_reference

# (T, K, E, D, F): widths that are multiples of 8 and of no block, more than one block, one choice, no token
SHAPES = [(37, 3, 5, 40, 24), (9, 2, 4, 2056, 264), (5, 1, 1, 8, 8), (0, 2, 3, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {  # one unit in the last place of bfloat16: the interpreter cuts off where a GPU rounds
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
}


@pytest.fixture(params=SHAPES, ids=str)
def case(request, kernel_device):
    """A permutation with choices of "none", gates, and a function that makes random tensors."""
    return Case(*request.param, kernel_device)


class Case:
    def __init__(self, T, K, E, D, F, device):
        self.T, self.K, self.D, self.F, self.device = T, K, D, F, device
        self.generator = torch.Generator().manual_seed(0)
        ids_TK = torch.randint(0, E + 1, (T, K), generator=self.generator).to(device)
        self.row_of_choice_TK, self.choice_of_row_R, self.offsets_E = sort_by_expert_reference(ids_TK, E)
        self.n_used = int(self.offsets_E[-1])
        self.gates_TK = self.random(T, K).abs()

    def random(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def rows(self, width, dtype):
        """Random rows; those past the end hold NaN, as uninitialised memory may."""
        rows_R = self.random(self.T * self.K, width, dtype=dtype)
        rows_R[self.n_used :] = float("nan")
        return rows_R


@pytest.mark.parametrize("dtype", DTYPES)
def test_spread_copies_each_token_into_its_rows(case, dtype):
    x_TD = case.random(case.D, case.T, dtype=dtype).T  # strided, as a gradient may be
    inputs = x_TD, case.row_of_choice_TK
    assert torch.equal(rows.spread(*inputs), rows.spread_reference(*inputs))


@pytest.mark.parametrize("size", [4, 128])
def test_tiles_cut_each_experts_rows_and_the_busiest_expert_comes_first(case, size):
    inputs = case.T * case.K, case.offsets_E, size
    ((found, experts_E),), (wanted, wanted_E) = row_tiles(*inputs), row_tiles_reference(*inputs)
    assert torch.equal(experts_E, wanted_E)
    assert torch.equal(found[:, 0], wanted[:, 0])
    used = found[:, 0] >= 0
    assert torch.equal(found[used], wanted[used])


@pytest.mark.parametrize("n_tokens", [0, 5, 20, 37])
def test_tiles_of_which_all_rows_are_of_the_first_tokens_and_the_rest_are_all_tiles(case, n_tokens):
    n_choices = min(n_tokens, case.T) * case.K
    n_rows = int((case.choice_of_row_R[: case.n_used] < n_choices).sum())
    here = Here(case.choice_of_row_R, n_choices, n_rows)
    parts = row_tiles(case.T * case.K, case.offsets_E, 4, here)
    first, rest = ([tuple(tile) for tile in part.tiles_N3.tolist() if tile[0] >= 0] for part in parts)
    every, experts_E = row_tiles_reference(case.T * case.K, case.offsets_E, 4)
    assert all(torch.equal(part.experts_E, experts_E) for part in parts)

    def is_here(tile):
        return all(choice < n_choices for choice in case.choice_of_row_R[tile[1] : min(tile[1] + 4, tile[2])])

    every = [tuple(tile) for tile in every.tolist() if tile[0] >= 0]
    assert first == [tile for tile in every if is_here(tile)]
    assert rest == [tile for tile in every if not is_here(tile)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_gather_sum_adds_the_used_rows_of_each_token(case, dtype, gated):
    arguments = case.rows(case.D, dtype), case.row_of_choice_TK, case.offsets_E, case.gates_TK if gated else None
    found_TD, wanted_TD = rows.gather_sum(*arguments), rows.gather_sum_reference(*arguments)
    torch.testing.assert_close(found_TD, wanted_TD, **TOLERANCE[dtype])
    for function, values_TD in ((rows.gather_sum, found_TD), (rows.gather_sum_reference, wanted_TD)):
        buffer = torch.full((case.T + 2, case.D), torch.nan, dtype=dtype, device=case.device)
        function(*arguments, out_TD=buffer[1:-1])
        assert torch.equal(buffer[1:-1], values_TD)
        assert buffer[[0, -1]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_the_used_rows(case, dtype):
    gate_up_RF = case.rows(2 * case.F, dtype)
    found_RF = rows.swiglu(gate_up_RF, case.offsets_E)[: case.n_used]
    wanted_RF = rows.swiglu_reference(gate_up_RF, case.offsets_E)[: case.n_used]
    torch.testing.assert_close(found_RF, wanted_RF, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_backward_of_the_used_rows(case, dtype):
    grad_h_RF, gate_up_RF = case.rows(case.F, dtype), case.rows(2 * case.F, dtype)
    arguments = (grad_h_RF, gate_up_RF, case.gates_TK, case.choice_of_row_R, case.offsets_E)
    found, wanted = rows.swiglu_backward(*arguments), rows.swiglu_backward_reference(*arguments)
    n = case.n_used
    torch.testing.assert_close(found[0][:n], wanted[0][:n], **TOLERANCE[dtype])
    twice = {"rtol": 2 * TOLERANCE[dtype]["rtol"], "atol": 1e-5}  # h is rounded, and then its product with the gate
    torch.testing.assert_close(found[1][:n], wanted[1][:n], **twice)
    rounding = 4 * case.F**0.5 * TOLERANCE[dtype]["rtol"]  # of h, at random in a sum of F terms of size one
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=max(1e-5, rounding))
    none_TK = case.row_of_choice_TK >= n
    assert (found[2][none_TK] == 0).all()


def test_swiglu_backward_is_what_autograd_finds(case):
    gate_up_RF = case.random(case.n_used, 2 * case.F).requires_grad_()
    grad_h_RF, gates_TK = case.random(case.n_used, case.F), case.gates_TK.clone().requires_grad_()
    gates_R = gates_TK.flatten()[case.choice_of_row_R[: case.n_used]]
    h_RF = rows.swiglu_reference(gate_up_RF, case.offsets_E)
    wanted = torch.autograd.grad(((gates_R[:, None] * h_RF) * grad_h_RF).sum(), [gate_up_RF, gates_TK])
    pad = (0, 0, 0, case.T * case.K - case.n_used)
    grad_gate_up_RF, gated_h_RF, grad_gates_TK = rows.swiglu_backward(
        torch.nn.functional.pad(grad_h_RF, pad),
        torch.nn.functional.pad(gate_up_RF.detach(), pad),
        case.gates_TK,
        case.choice_of_row_R,
        case.offsets_E,
    )
    torch.testing.assert_close(grad_gate_up_RF[: case.n_used], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_gates_TK, wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gated_h_RF[: case.n_used], (gates_R[:, None] * h_RF).detach(), rtol=1e-4, atol=1e-5)

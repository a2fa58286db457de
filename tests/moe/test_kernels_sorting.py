"""The counting sort against `argsort(stable=True)`. Without a GPU the kernels run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from moelm.moe.kernels import sorting


def agrees_with_the_reference(ids_TK, n_experts, device):
    found = sorting.sort_by_expert(ids_TK.to(device), n_experts)
    wanted = sorting.sort_by_expert_reference(ids_TK.to(device), n_experts)
    for name, ours, theirs in zip(("row_of_choice", "choice_of_row", "offsets"), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("T", "K", "n_experts"),
    [(40, 3, 5), (1, 1, 1), (0, 2, 3), (1024, 1, 7), (900, 3, 9), (70, 16, 512)],
    ids=["small", "one_choice", "no_token", "a_full_block", "three_blocks", "many_experts"],
)
def test_rows_and_offsets_are_those_of_a_stable_argsort(T, K, n_experts, kernel_device):
    ids_TK = torch.randint(0, n_experts + 1, (T, K), generator=torch.Generator().manual_seed(0))  # "none" among them
    agrees_with_the_reference(ids_TK, n_experts, kernel_device)


@pytest.mark.parametrize("expert", [0, 6, 7], ids=["first", "last", "none"])
def test_all_choices_may_be_of_one_expert(expert, kernel_device):
    agrees_with_the_reference(torch.full((600, 2), expert), 7, kernel_device)


def test_ids_may_be_strided(kernel_device):
    ids_KT = torch.randint(0, 5, (3, 50), generator=torch.Generator().manual_seed(0))
    agrees_with_the_reference(ids_KT.T, 5, kernel_device)


def test_counts_are_carried_over_more_blocks_than_are_summed_at_once(kernel_device, monkeypatch):
    monkeypatch.setattr(sorting, "BLOCK", 32)
    ids_TK = torch.randint(0, 4, (300 * 32, 1), generator=torch.Generator().manual_seed(0))
    agrees_with_the_reference(ids_TK, 3, kernel_device)

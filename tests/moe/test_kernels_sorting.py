"""The counting sort against `argsort(stable=True)`. Without a GPU the kernels run in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from moelm.moe.kernels import sorting


@pytest.fixture(autouse=True)
def _small_blocks_on_a_cpu(kernel_device, monkeypatch):
    if kernel_device.type == "cpu":  # the interpreter sorts slowly
        monkeypatch.setattr(sorting, "BLOCK", 16)
        monkeypatch.setattr(sorting, "SUMMED", 4)


def random_ids(T, K, n_experts):
    """With some of "none"."""
    return torch.randint(0, n_experts + 1, (T, K), generator=torch.Generator().manual_seed(0))


def agrees_with_the_reference(ids_TK, n_experts, device):
    found = sorting.sort_by_expert(ids_TK.to(device), n_experts)
    wanted = sorting.sort_by_expert_reference(ids_TK.to(device), n_experts)
    for name, ours, theirs in zip(("row_of_choice", "choice_of_row", "offsets"), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("T", "K", "n_experts"),
    [(40, 3, 5), (1, 1, 1), (0, 2, 3), (6, 16, 512)],
    ids=["small", "one_choice", "no_token", "many_experts"],
)
def test_rows_and_offsets_are_those_of_a_stable_argsort(T, K, n_experts, kernel_device):
    agrees_with_the_reference(random_ids(T, K, n_experts), n_experts, kernel_device)


@pytest.mark.parametrize("n_extra", [0, 1])
def test_counts_are_carried_over_more_blocks_than_are_summed_at_once(n_extra, kernel_device):
    n_choices = (2 * sorting.SUMMED + 1) * sorting.BLOCK + n_extra
    agrees_with_the_reference(random_ids(n_choices, 1, 7), 7, kernel_device)


@pytest.mark.parametrize("expert", [0, 6, 7], ids=["first", "last", "none"])
def test_all_choices_may_be_of_one_expert(expert, kernel_device):
    agrees_with_the_reference(torch.full((20, 2), expert), 7, kernel_device)


def test_ids_may_be_strided(kernel_device):
    agrees_with_the_reference(random_ids(3, 20, 5).T, 5, kernel_device)

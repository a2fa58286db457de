"""Ranks that share the experts, here threads of one process, against a layer that has them all."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from moelm.config import ModelConfig, from_dict
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.dispatch import expert_parallel
from moelm.moe.dispatch.dropless import sort_by_expert
from moelm.moe.dispatch.expert_parallel import ExpertParallel
from moelm.moe.kernels import HAS_TRITON
from moelm.moe.types import RouteContext, TokenChoice

T, D = 24, 32
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


class Rank:
    """A process group of threads, as one of them sees it. Only while they wait for each other do others run."""

    def __init__(self, rank: int, ranks: list[Rank], barrier: threading.Barrier, turn: threading.Lock) -> None:
        self.number, self.ranks, self.barrier, self.turn = rank, ranks, barrier, turn
        self.group_name = f"thread-{rank}"
        self.parts: list[torch.Tensor] = []
        self.sent = 0  # bytes, for other ranks
        self.n_gathered = 0  # exchanges of choices

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return len(self.ranks)

    def exchange(self, result, message, received=None, sent=None):
        self.parts = list(message.detach().split(sent or [len(message) // self.size()] * self.size()))
        self.sent += sum(part.nbytes for rank, part in enumerate(self.parts) if rank != self.number)
        self.wait_for_all()
        parts = [rank.parts[self.number] for rank in self.ranks]
        assert [len(part) for part in parts] == (received or [len(part) for part in self.parts])
        with torch.no_grad():
            result.copy_(torch.cat(parts))
        self.wait_for_all()

    def gather(self, result, message):
        self.n_gathered += 1
        return self.exchange(result, torch.cat([message] * self.size()))

    def wait_for_all(self):
        self.turn.release()
        try:
            self.barrier.wait(60)
        finally:
            self.turn.acquire()


class Landing:
    """A journey that begins only when somebody waits for it."""

    def __init__(self, rank: Rank, result: torch.Tensor, *rest: Any) -> None:
        self.wait = partial(rank.exchange, result, *rest)
        result.fill_(torch.nan)


@pytest.fixture
def all_to_all(monkeypatch):
    def all_to_all_single(result, message, received=None, sent=None, group=None, async_op=False):
        if async_op:
            return Landing(group, result, message, received, sent)
        return group.exchange(result, message, received, sent)

    def all_gather(result, message, group=None):
        group.gather(result, message)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    monkeypatch.setattr(expert_parallel, "all_gather", all_gather)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised
    yield
    torch.use_deterministic_algorithms(False)
    assert expert_parallel._under_way == {}


def on_ranks(n_ranks, run):
    """What `run(group)` returns on each of `n_ranks` threads, and the groups."""
    barrier, turn, ranks = threading.Barrier(n_ranks), threading.Lock(), []
    ranks += [Rank(rank, ranks, barrier, turn) for rank in range(n_ranks)]
    results: list[Any] = [None] * n_ranks

    def task(rank):
        with turn:
            try:
                results[rank.number] = run(rank)
            except BaseException as error:
                results[rank.number] = error
                barrier.abort()

    threads = [threading.Thread(target=task, args=(rank,)) for rank in ranks[1:]]
    for thread in threads:
        thread.start()
    task(ranks[0])  # here, since torch 2.11 cannot compile in one thread after the other
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results, ranks


def make_model(moe):
    raw = {
        "n_layers": 1,
        "d_model": D,
        "vocab_size": 64,
        "attention": {"name": "gqa", "n_heads": 4},
        "moe": {"n_experts": 8, "top_k": 3, "d_expert": 16, "balancers": [], **moe},
        "init": {"std": 0.2},
    }
    model = GPT(from_dict(ModelConfig, raw, "model"))
    initialize(model, 0)
    return model


def make_block(moe):
    return make_model(moe).blocks[0].moe


def run_layer(layer, x_BLD, mask_BL, mixed=False):
    device = x_BLD.device
    x_BLD = x_BLD.clone().requires_grad_()
    context = RouteContext(torch.zeros(x_BLD.shape[:2], dtype=torch.int64, device=device), mask_BL, True)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        y_BLD, stats = layer(x_BLD, context)
    grad_BLD = torch.randn(x_BLD.shape, generator=torch.Generator().manual_seed(5)).to(device)
    with torch.autograd.set_multithreading_enabled(False):  # one thread of autograd's would wait for itself
        (y_BLD * grad_BLD).sum().backward()
    found = {"y": y_BLD.detach(), "x": x_BLD.grad, "kept": stats.kept_BE}
    return found | {name: parameter.grad for name, parameter in layer.named_parameters()}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"n_shared_experts": 1, "shared_gate": True},
    "capacity": {"dispatch": {"name": "capacity", "capacity_factor": 0.6}},
    "one_rank_idle": {"router": {"name": "top_k", "selection_bias": True}},
    "loop": {"experts": {"backend": "loop", "bias": True}},
    "multi_head": {"router": {"name": "multi_head", "n_heads": 2}},
}


def shared_and_alone(moe, n_ranks, idle=False, mixed=False, device="cpu", n_tokens=T, masked=True, static=False):
    """What ranks that share the experts find, each with tokens of its own, some of them masked, and one rank with none
    that counts; and what each would find with all experts. With `idle` the last rank's experts are not chosen."""
    x_PBLD = torch.randn(n_ranks, 2, n_tokens // 2, D, generator=torch.Generator().manual_seed(1)).to(device)
    mask_PBL = torch.rand(n_ranks, 2, n_tokens // 2, generator=torch.Generator().manual_seed(2)) < 0.8
    mask_PBL[-1] = False
    mask_PBL |= not masked
    n_local = 8 // n_ranks

    def make(first=0, count=8):
        layer = make_block(moe)
        if idle:
            layer.router.expert_bias[-n_local:] = -9.0
        for key, parameter in layer.experts.named_parameters():
            setattr(layer.experts, key, torch.nn.Parameter(parameter.detach()[first : first + count].clone()))
        return layer.to(device)

    def run(group):
        layer = make(group.rank() * n_local, n_local)
        layer.exchange = ExpertParallel(group, 8, static)
        return run_layer(layer, x_PBLD[group.rank()], mask_PBL[group.rank()].to(device), mixed)

    shared, groups = on_ranks(n_ranks, run)
    assert all(group.sent for group in groups[:-1])
    return shared, [run_layer(make(), x, mask.to(device), mixed) for x, mask in zip(x_PBLD, mask_PBL, strict=True)]


def assert_same(shared, alone, close):
    for found, wanted in zip(shared, alone, strict=True):
        assert torch.equal(found["kept"], wanted["kept"])
        for key in found:
            if not key.startswith("experts."):
                close(found[key], wanted[key])
    for key in alone[0]:
        if key.startswith("experts."):  # one's gradient comes from the tokens of all ranks
            close(torch.cat([found[key] for found in shared]), sum(each[key] for each in alone))


@pytest.fixture
def few_sizes(monkeypatch):
    """Tokens in multiples of 4 and rows of 14, so that some are nobody's."""
    monkeypatch.setattr(expert_parallel, "STEPS", 5)


@pytest.fixture(params=[False, True], ids=["", "static"])
def static(request, monkeypatch):
    """Whether the exchange is, for which the host waits for no number."""
    if request.param:
        monkeypatch.setattr(expert_parallel, "read_splits", None)
    return request.param


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_the_experts_compute_what_one_does_that_has_them_all(
    all_to_all, few_sizes, name, n_ranks, static
):
    idle = name == "one_rank_idle"
    shared, alone = shared_and_alone(CASES[name], n_ranks, idle, static=static)
    assert_same(shared, alone, partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6))
    if idle:
        assert not shared[-1]["experts.down"].any()


@NEEDS_TRITON
@pytest.mark.parametrize("idle", [False, True], ids=["", "one_rank_idle"])
def test_fused_experts_take_what_other_ranks_send(all_to_all, few_sizes, kernel_device, idle, static):
    moe = {"experts": {"backend": "fused"}, "router": {"name": "top_k", "selection_bias": True}}
    shared, alone = shared_and_alone(moe, 2, idle, mixed=True, device=kernel_device, static=static)

    def close(found, wanted):
        assert (found.float() - wanted.float()).norm() <= 0.01 * wanted.float().norm()

    assert_same(shared, alone, close)


@NEEDS_TRITON
@pytest.mark.parametrize("backend", ["loop", "fused"])
def test_steps_end_with_the_tokens_of_all_ranks(all_to_all, few_sizes, kernel_device, backend):
    """Each of 2 x 26 goes to both ranks, and steps are 5."""
    moe, mixed = {"top_k": 7, "experts": {"backend": backend}}, backend == "fused"
    shared, alone = shared_and_alone(moe, 2, mixed=mixed, device=kernel_device, n_tokens=26, masked=False)

    def close(found, wanted):
        assert (found.float() - wanted.float()).norm() <= (0.01 if mixed else 1e-5) * wanted.float().norm()

    assert_same(shared, alone, close)


def test_a_token_travels_once_to_each_of_its_ranks_and_back_and_no_rank_gets_rows_for_others(all_to_all):
    ids_TK = torch.tensor([[0, 1, 2, 3], [0, 4, 1, 5], [8, 8, 8, 8], [7, 6, 0, 8]])  # on 2 ranks of 4 experts; 8: none
    gates_TK = torch.arange(16.0).view(4, 4)
    x_TD = torch.arange(4.0).unsqueeze(1) * torch.ones(D)

    def run(group):
        exchange = ExpertParallel(group, 8)
        routing = TokenChoice(ids_TK, gates_TK)
        journey = exchange.send(x_TD, routing)
        x_ND, local, plan = exchange.receive(journey)
        seen = group.sent
        y_TD = exchange.bring_home(exchange.send_back(x_ND * (1 + group.rank()), journey), journey)
        return x_ND, local, plan, y_TD, group.sent - seen

    (first, second), _ = on_ranks(2, run)
    assert first[0][:, 0].tolist() == [0, 1, 3] * 2
    assert second[0][:, 0].tolist() == [1, 3] * 2
    assert first[1].expert_ids_TK[:3].tolist() == [[0, 1, 2, 3], [0, 4, 1, 4], [4, 4, 0, 4]]
    assert second[1].expert_ids_TK[:2].tolist() == [[4, 0, 4, 1], [3, 2, 4, 4]]
    assert first[1].gates_TK[:2].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert second[1].gates_TK[:2].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert [len(each[2].choice_of_row_R) for each in (first, second)] == [14, 8]
    assert first[3][:, 0].tolist() == [0, 1 + 2, 0, 3 + 6]
    assert first[4] == 3 * D * 4  # what it had received of the other


def test_in_a_static_exchange_all_tokens_travel_and_sizes_are_known(all_to_all):
    ids_TK = torch.tensor([[0, 1], [8, 8], [5, 8]])  # on 4 ranks of 2 experts; 8: none

    def run(group):
        exchange = ExpertParallel(group, 8, static=True)
        x_TD = torch.arange(3.0).unsqueeze(1) + 10 * group.rank() * torch.ones(3, D)
        x_ND, local, plan = exchange.receive(exchange.send(x_TD, TokenChoice(ids_TK, ids_TK / 8)))
        return x_ND[:, 0].tolist(), group.sent, local, plan

    found, _ = on_ranks(4, run)
    for rank, (x_N, sent, local, plan) in enumerate(found):
        seated = sorted(range(4), key=lambda each: (each != rank, each))
        assert x_N == [t + 10 * each for each in seated for t in range(3)]
        assert sent == 3 * 3 * (D + 2 * 2) * 4  # tokens; choices and gates
        assert (len(local.gates_TK), len(plan.choice_of_row_R)) == (12, 24)
        assert plan.offsets_E.tolist() == [[4, 8], [0, 0], [0, 4], [0, 0]][rank]


def test_what_is_on_its_way_home_may_be_written_over(all_to_all, static):
    """By a compiler that needs it no more."""

    def run(group):
        exchange = ExpertParallel(group, 8, static)
        journey = exchange.send(torch.ones(3, D), TokenChoice(torch.tensor([[0, 4]] * 3), torch.ones(3, 2)))
        y_ND = exchange.receive(journey)[0] * (1 + group.rank())
        landing_SD = exchange.send_back(y_ND, journey)
        y_ND.fill_(torch.nan)
        return exchange.bring_home(landing_SD, journey).unique().tolist()

    assert on_ranks(2, run)[0] == [[3.0], [3.0]]


def test_two_journeys_at_once_of_a_rank_that_sends_nothing_are_told_apart(all_to_all):
    def run(group):
        exchange = ExpertParallel(group, 8)
        ids_TK = torch.full((3, 2), 8 if group.rank() else 5)
        routing = TokenChoice(ids_TK, torch.ones(3, 2))
        journeys = [exchange.send(torch.full((3, D), value), routing) for value in (1.0, 2.0)]
        return [exchange.receive(journey)[0].unique().tolist() for journey in journeys]

    assert on_ranks(2, run)[0] == [[[], []], [[1.0], [2.0]]]


@pytest.mark.parametrize("fewest", [True, False], ids=["one_rank_gets_all", "one_in_three"])
def test_sizes_are_those_of_what_a_rank_receives(all_to_all, fewest):
    """Not of what all ranks choose: rows for each of 4 x 3 tokens with 2 choices would be 24."""

    def run(group):
        ids_TK = torch.tensor([[4, 5]] * 3 if fewest else [[0, 1], [4, 8], [8, 8]])
        exchange = ExpertParallel(group, 8)
        x_ND, local, plan = exchange.receive(exchange.send(torch.ones(3, D), TokenChoice(ids_TK, ids_TK / 8)))
        assert len(x_ND) == len(local.gates_TK) == len(plan.row_of_choice_TK) == len(plan.valid_TK)
        return len(x_ND), len(plan.choice_of_row_R), int(plan.offsets_E[-1])

    found, _ = on_ranks(4, run)
    assert found == (
        [(0, 0, 0), (0, 0, 0), (12, 24, 24), (0, 0, 0)] if fewest else [(4, 8, 8), (0, 0, 0), (4, 4, 4), (0, 0, 0)]
    )


def test_rows_in_steps_are_never_those_of_a_token_that_was_not_received(all_to_all):
    """Of 100 tokens rows come in steps of 4, and the only token has 3."""

    def run(group):
        ids_TK = torch.full((100, 3), 8)
        ids_TK[50] = torch.tensor([5, 6, 4])
        exchange = ExpertParallel(group, 8)
        routing = TokenChoice(ids_TK if group.rank() else torch.full((100, 3), 8), torch.ones(100, 3))
        x_ND, _, plan = exchange.receive(exchange.send(torch.ones(100, D), routing))
        return len(x_ND), plan.choice_of_row_R.tolist()

    assert on_ranks(2, run)[0] == [(0, []), (1, [2, 0, 1])]


@pytest.mark.parametrize("ids", [[8, 8], [0, 8], [6, 7], [0, 6], [6, 2], None], ids=str)
def test_gates_have_their_gradients_from_the_ranks_of_their_experts(all_to_all, few_sizes, ids):
    """Each is the value of its expert, exactly; 0 for a dropped choice. None: different choices everywhere."""
    T, P = 7, 4

    def choices(rank):
        generator = torch.Generator().manual_seed(rank)
        ids_TK = torch.randint(9, (T, 2), generator=generator) if ids is None else torch.tensor([ids] * T)
        return ids_TK, torch.rand(T, 2, generator=generator).requires_grad_()

    def run(group):
        exchange = ExpertParallel(group, 8)
        ids_TK, gates_TK = choices(group.rank())
        _, local, plan = exchange.receive(exchange.send(torch.ones(T, D), TokenChoice(ids_TK, gates_TK)))
        value_NK = (local.expert_ids_TK + 2 * group.rank() + 1).float()
        where_NK = torch.where(plan.valid_TK, value_NK, torch.nan)  # nobody reads what is not here
        with torch.autograd.set_multithreading_enabled(False):
            local.gates_TK.backward(where_NK)
        return local.gates_TK[plan.valid_TK].tolist(), gates_TK.grad

    found, _ = on_ranks(P, run)
    for rank in range(P):
        ids_TK, _ = choices(rank)
        assert torch.equal(found[rank][1], torch.where(ids_TK < 8, ids_TK + 1.0, 0.0))
    sent = [gate for i in range(P) for gate in choices(i)[1][choices(i)[0] < 8].tolist()]
    assert sorted(gate for gates, _ in found for gate in gates) == sorted(sent)


@NEEDS_TRITON
def test_choices_of_experts_elsewhere_take_no_memory_in_fused_experts(kernel_device):
    """In a quarter of the rows of a plan that has one for each choice, to the same result."""
    experts = make_block({"experts": {"backend": "fused"}, "d_expert": 24}).to(kernel_device).experts
    ids_TK = torch.full((16, 4), 8)
    ids_TK[:, 0] = torch.arange(16) % 8
    x_TD = torch.randn(16, D, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    gates_TK = torch.ones(16, 4, device=kernel_device)
    plan = sort_by_expert(ids_TK.to(kernel_device), 8)
    found, saved = [], []
    for n_rows in (64, 16):
        few = plan._replace(choice_of_row_R=plan.choice_of_row_R[:n_rows].clone())
        inputs = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
        with (
            torch.autocast(kernel_device.type, torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.shape) or each, lambda each: each),
        ):
            y_TD = experts.mix(*inputs, few)
        gradients = torch.autograd.grad(y_TD.float().square().sum(), [*inputs, *experts.parameters()])
        found.append([y_TD, gradients[0], gradients[1][:, 0], *gradients[2:]])
    for many, few in zip(*found, strict=True):
        assert torch.equal(many, few)
    assert saved.count((64, 48)) == saved.count((16, 48)) == 1


FUSED = {"experts": {"backend": "fused"}}


@pytest.mark.parametrize(
    "moe", [pytest.param({}, marks=pytest.mark.slow), pytest.param(FUSED, marks=NEEDS_TRITON)], ids=["", "fused"]
)
@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_a_block_compiles_whole_and_once_for_any_number_of_tokens(all_to_all, mode, moe, static):
    def steps(group=None):
        model = make_model({"n_shared_experts": 1, **moe})
        model.activation_checkpointing = mode
        if group is not None:
            model.blocks[0].moe.exchange = ExpertParallel(group, 8, static)
            model.compile_blocks(backend="aot_eager")  # fullgraph would allow what is asked here
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            tokens_BL, mask_BL = (
                torch.randint(64, (2, 9), generator=generator),
                torch.rand(2, 8, generator=generator) < 0.7,
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=moe == FUSED):
                loss = model(tokens_BL[:, :-1], tokens_BL[:, 1:], token_mask_BL=mask_BL).loss
            loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch._dynamo.reset()
    counters.clear()
    (found,), (group,) = on_ranks(1, steps)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert group.n_gathered == 3  # recomputation asks nobody again
    for name, wanted in steps().items():
        assert torch.equal(found[name], wanted), name

"""Experts on several ranks: a token travels once to each rank that holds any of its experts, and one sum comes back.

Beside the suffixes of `moe/types.py`:

    P ranks that share the experts    V = P T tokens of all of them
    S tokens sent by this rank, one for each of a token's ranks    N received by it    R of their choices with rows

Sent and received tokens begin with those that stay, which never wait for a link; then come those for or from the other
ranks, in their order. Every rank is told all choices and makes of them a plan of static shapes. S, N and R depend on
the data: the host waits for them, the only wait here, once for the forward and the backward pass. Shapes inside what is
compiled are unbacked symbols, so no number of tokens compiles anything anew. A `static` exchange waits for nothing:
every token travels to every rank, and there is room for all choices, S = N = V and R = V K.

On [S, D] tensors a journey is under way between two of the four ops below: `send` (T to S) begins one that `receive`
(S to N) ends, `send_back` (N to S) begins one that `gather_home` (S to T) ends. What the layer does between the two
overlaps it. The gradient goes the same ways back: the derivative of each op is the one that begins or ends the
opposite journey. Rows are added in the order of ranks. `fused.py` ends one journey and begins the other inside of its
ops, with products of tokens that stay in between.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelm.moe.dispatch.dropless import Permutation, sort_by_expert
from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op
from moelm.moe.types import TokenChoice

if HAS_TRITON:
    from moelm.moe.kernels.rows import gather_sum

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
STEPS = 64  # experts get multiples of T / 64 tokens and T K / 64 rows, so that memory of the same size is there again
_groups: dict[str, dist.ProcessGroup] = {}  # by the name that the ops are given
_under_way: dict[int, tuple[Any, Tensor, Tensor]] = {}  # storage of the [S, D] tensor -> handle, what was sent, result


class Departure(NamedTuple):
    """A layer's tokens on their way."""

    packed_SD: Tensor  # under way to the ranks; those that stay are not written
    x_TD: Tensor  # what it was made of; no gradient
    token_of_row_S: Tensor  # int32
    row_of_rank_TP: Tensor  # int32 row among S of what token t sends to rank p; past the last one if nothing
    ends_P: Tensor  # int32 ends of the rows, those that stay first
    splits: Tensor | None  # int64 on the CPU, a `Split`; None: every token to every rank


class Journey(NamedTuple):
    """A `Departure`, and what becomes of what arrives."""

    packed_SD: Tensor
    x_TD: Tensor
    token_of_row_S: Tensor
    row_of_rank_TP: Tensor
    ends_P: Tensor
    splits: Tensor | None
    gates_VK: Tensor  # of the tokens of all ranks: the N that this one receives come first
    plan: Permutation  # of their choices, by local ids: "none" is E / P. The first N tokens fill the first N K rows
    n_tokens: int  # N
    n_rows: int  # R


class ExpertParallel:
    """What a layer sends to the ranks of `group` and gets back. Rank p holds the experts p E/P ... (p + 1) E/P - 1.

    Holds no parameters. All ranks call its methods equally often, in one order, with equally many tokens: of what
    choices have another shape on another rank, collectives make nonsense or an error of the backend's.
    """

    def __init__(self, group: dist.ProcessGroup, n_experts: int, static: bool = False) -> None:
        self.group = group.group_name
        self.n_ranks = group.size()
        self.n_experts = n_experts
        self.n_local = n_experts // self.n_ranks
        self.rank = group.rank()
        self.static = static
        _groups[self.group] = group

    def send(self, x_TD: Tensor, routing: TokenChoice) -> Journey:
        """Begins the journey of x, in its dtype. `routing` names experts by their global ids."""
        P, (ids_TK, gates_TK) = self.n_ranks, (routing.expert_ids_TK, routing.gates_TK.float())
        T, K = ids_TK.shape
        ranks_P = torch.arange(P, device=ids_TK.device)
        seats_P = torch.where(ranks_P == self.rank, 0, ranks_P + (ranks_P < self.rank))  # its own tokens are first
        if self.static:
            token_T = torch.arange(T, dtype=torch.int32, device=ids_TK.device)
            row_of_rank_TP, ends_P = token_T.unsqueeze(1) + T * seats_P.int(), T * (ranks_P.int() + 1)
            rank_of_seat_P = torch.where(ranks_P == 0, self.rank, ranks_P - (ranks_P <= self.rank).long())
            row_of_token_V = row_of_rank_TP.T.flatten()
            token_of_row_V = (token_T + T * rank_of_seat_P.int().unsqueeze(1)).flatten()
        message_T2K = torch.cat([ids_TK.int(), gates_TK.detach().view(torch.int32)], 1)
        ids_VK, bits_VK = gather_choices(message_T2K, P, self.group).chunk(2, 1)
        if self.static:
            departure = self._depart(x_TD, token_T.repeat(P), row_of_rank_TP, ends_P, None)
        ids_VK = ids_VK.long() - self.rank * self.n_local
        here_VK = (ids_VK >= 0) & (ids_VK < self.n_local)
        if not self.static:
            seats_PT = torch.where(here_VK.any(1).view(P, T), seats_P.unsqueeze(1), P)
            order = sort_by_expert(seats_PT.view(-1, 1), P)
            row_of_token_V, token_of_row_V = order.row_of_choice_TK.flatten(), order.choice_of_row_R
        plan = sort_by_expert(torch.where(here_VK, ids_VK, self.n_local).index_select(0, token_of_row_V), self.n_local)
        arranged = token_of_row_V, row_of_token_V, here_VK
        gates_VK = _GatherGates.apply(gates_TK, bits_VK.view(torch.float32), *arranged, self.group)
        if self.static:
            return Journey(*departure, gates_VK, plan, P * T, P * T * K)
        goes_TP = (ids_TK.unsqueeze(-1) // self.n_local == ranks_P).any(1)
        trips = sort_by_expert(torch.where(goes_TP, seats_P, P), P)
        n_rows_stay = here_VK.view(P, -1)[self.rank].sum(0, keepdim=True, dtype=torch.int32)
        counts = torch.cat([trips.offsets_E, order.offsets_E, n_rows_stay, plan.offsets_E[-1:]])
        splits, token_of_row_S, sizes_NR0 = read_splits(counts, trips.choice_of_row_R, P, K)
        departure = self._depart(x_TD, token_of_row_S, trips.row_of_choice_TK, trips.offsets_E, splits)
        return Journey(*departure, gates_VK, plan, sizes_NR0.shape[0], sizes_NR0.shape[1])

    def _depart(
        self, x_TD: Tensor, token_of_row_S: Tensor, row_of_rank_TP: Tensor, ends_P: Tensor, splits: Tensor | None
    ) -> Departure:
        rows = row_of_rank_TP, ends_P, splits
        packed_SD = _Send.apply(x_TD, token_of_row_S, *rows, self.group)
        return Departure(packed_SD, x_TD.detach(), token_of_row_S, *rows)

    def receive(self, journey: Journey) -> tuple[Tensor, TokenChoice, Permutation]:
        """(x [N, D], choices [N, K] of local experts, their rows): a batch for the local experts."""
        plan, n_tokens = journey.plan, journey.n_tokens
        tables = plan.expert_ids_TK, plan.row_of_choice_TK, plan.choice_of_row_R
        trimmed = _Trim.apply(journey.gates_VK, *tables, n_tokens, journey.n_rows)
        gates_NK, ids_NK, row_of_choice_NK, choice_of_row_R = trimmed
        sent = journey.packed_SD, journey.x_TD, journey.token_of_row_S
        x_ND = _Receive.apply(*sent, journey.splits, n_tokens, self.group)
        plan = Permutation(ids_NK, row_of_choice_NK, choice_of_row_R, ids_NK != self.n_local, plan.offsets_E)
        return x_ND, TokenChoice(ids_NK, gates_NK), plan

    def send_back(self, y_ND: Tensor, journey: Journey) -> Tensor:
        """Begins the journey home of y: [S, D], for `bring_home`."""
        landing_SD: Tensor = _SendBack.apply(y_ND, journey.splits, journey.packed_SD.shape[0], self.group)
        return landing_SD

    def bring_home(self, landing_SD: Tensor, journey: Journey) -> Tensor:
        """y [T, D]: the sum of what the ranks made of a token; 0 for one without a choice."""
        rows = journey.row_of_rank_TP, journey.ends_P, journey.token_of_row_S
        y_TD: Tensor = _GatherHome.apply(landing_SD, *rows, journey.splits, self.group)
        return y_TD


# ---------------------------------------------------------------------------------------------- choices


@op(
    "moelm::gather_choices",
    fake=lambda message, n_ranks, _: message.new_empty(n_ranks * message.shape[0], message.shape[1]),
    recordable=False,
)
def gather_choices(message_T2K: Tensor, n_ranks: int, group: str) -> Tensor:
    """[V, 2 K], in the order of ranks. 8 T K bytes sent to each of the other ranks."""
    choices_V2K = message_T2K.new_empty(n_ranks * len(message_T2K), message_T2K.shape[1])
    all_gather(choices_V2K, message_T2K, group=_groups[group])
    return choices_V2K


@op("moelm::return_gates", fake=lambda grad_VK, *_: grad_VK.new_empty(grad_VK.shape), recordable=False)
def return_gates(grad_VK: Tensor, row_of_token_V: Tensor, here_VK: Tensor, group: str) -> Tensor:
    """[V, K]: what each rank, in their order, has for the T tokens of this one, 0 for a choice that is not there. 4 T K
    bytes sent to each of the other ranks."""
    sent_VK = torch.where(here_VK, grad_VK.index_select(0, row_of_token_V), 0.0)  # elsewhere may be anything
    returned_VK = torch.empty_like(sent_VK)
    dist.all_to_all_single(returned_VK, sent_VK, group=_groups[group])
    return returned_VK


class Split(NamedTuple):
    """How many rows and tokens travel, as the host knows it."""

    rows_stay: int  # choices of own tokens with an expert here; of a static exchange the most that there can be
    tokens: int  # N
    stay: int  # tokens
    sent: list[int]  # to each rank, 0 to itself
    received: list[int]


def split_of(splits: Tensor | None, group: str, n_sent: int, top_k: int = 0) -> Split:
    """Without `splits` that of a static exchange, of `n_sent` tokens at most `top_k` of whose choices are here."""
    P, rank = _groups[group].size(), _groups[group].rank()
    if splits is None:
        T = n_sent // P
        rows_stay, tokens, stay, others = T * top_k, n_sent, T, [T] * (2 * P - 2)
    else:
        rows_stay, tokens, stay, *others = splits.tolist()
    sent, received = others[: P - 1], others[P - 1 :]
    return Split(rows_stay, tokens, stay, *([*each[:rank], 0, *each[rank:]] for each in (sent, received)))


def _empty_splits(counts: Tensor, choice_of_row: Tensor, n_ranks: int, _: int) -> tuple[Tensor, Tensor, Tensor]:
    S, N, R = (torch.library.get_ctx().new_dynamic_size() for _ in range(3))
    splits = torch.empty(2 * n_ranks + 1, dtype=torch.int64, device="cpu")
    return splits, choice_of_row.new_empty(S), splits.new_empty(N, R, 0)


@op("moelm::read_splits", fake=_empty_splits, recordable=False)
def read_splits(counts: Tensor, choice_of_row: Tensor, n_ranks: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(splits, token_of_row_S, nothing of shape [N, R, 0], in steps) of what the host waits for, counts [2 P + 2]:
    ends of what is sent and of what is received, by rank with this one first; rows of choices that stay, and of all.
    `choice_of_row` says which of T P pairs of token and rank lies in a row that is sent."""
    known = counts.to("cpu", non_blocking=True)
    if counts.is_cuda:
        torch.cuda.current_stream(counts.device).synchronize()
    *ends, rows_stay, rows = known.tolist()
    sent, received = ends[:n_ranks], ends[n_ranks:]
    n_tokens = len(choice_of_row) // n_ranks
    tokens = min(_in_steps(received[-1], n_tokens), len(choice_of_row))  # no more than V
    rows = min(_in_steps(rows, n_tokens * top_k), tokens * top_k)
    others = [end - before for each in (sent, received) for before, end in pairwise(each)]
    splits = torch.tensor([rows_stay, tokens, sent[0], *others])
    return splits, choice_of_row[: sent[-1]] // n_ranks, splits.new_empty(tokens, rows, 0)


def _in_steps(n: int, most: int) -> int:
    step = max(1, most // STEPS)
    return -(-n // step) * step


@op(
    "moelm::trim",
    fake=lambda *each: (*(table.new_empty(each[4], table.shape[1]) for table in each[:3]), each[3].new_empty(each[5])),
    recordable=False,
)
def trim(
    gates_VK: Tensor, ids_VK: Tensor, row_of_choice_VK: Tensor, choice_of_row: Tensor, n_tokens: int, n_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the first three the first N, of the last the first R."""
    gates_NK, ids_NK, row_of_choice_NK = (each[:n_tokens].clone() for each in (gates_VK, ids_VK, row_of_choice_VK))
    return gates_NK, ids_NK, row_of_choice_NK, choice_of_row[:n_rows].clone()


# ----------------------------------------------------------------------------------------------- tokens


def _key(tensor_SD: Tensor) -> int:
    """Of a tensor and the views of it; tensors without elements have no address."""
    return int(tensor_SD.untyped_storage()._cdata)


def end(tensor_SD: Tensor) -> Tensor:
    """What the journey of this tensor brings, once it has ended: the current stream waits, the host does not."""
    handle, _, result = _under_way.pop(_key(tensor_SD))
    handle.wait()
    return result


@op(
    "moelm::send",
    fake=lambda x_TD, token_of_row_S, *_: x_TD.new_empty(token_of_row_S.shape[0], x_TD.shape[1]),
    recordable=False,
)
def send(x_TD: Tensor, token_of_row_S: Tensor, splits: Tensor | None, group: str) -> Tensor:
    """What begins its journey, [S, D]: S D elements read and written, those that stay where they are received at once,
    the others sent."""
    split = split_of(splits, group, len(token_of_row_S))
    packed_SD = x_TD.new_empty(len(token_of_row_S), x_TD.shape[1])
    torch.index_select(x_TD, 0, token_of_row_S[split.stay :], out=packed_SD[split.stay :])
    _begin_sending(packed_SD, x_TD, token_of_row_S, split, group)
    return packed_SD


def _begin_sending(packed_SD: Tensor, x_TD: Tensor, token_of_row_S: Tensor, split: Split, group: str) -> None:
    stay, n_received = split.stay, sum(split.received)
    result_ND = x_TD.new_empty(split.tokens, x_TD.shape[1])
    handle = dist.all_to_all_single(
        result_ND[stay : stay + n_received],
        packed_SD[stay:],
        split.received,
        split.sent,
        group=_groups[group],
        async_op=True,
    )
    torch.index_select(x_TD, 0, token_of_row_S[:stay], out=result_ND[:stay])
    _under_way[_key(packed_SD)] = handle, packed_SD, result_ND


@op(
    "moelm::receive",
    fake=lambda packed_SD, *others: packed_SD.new_empty(others[3], packed_SD.shape[1]),
    recordable=False,
)
def receive(
    packed_SD: Tensor,
    x_TD: Tensor | None,
    token_of_row_S: Tensor | None,
    splits: Tensor | None,
    n_rows: int,
    group: str,
) -> Tensor:
    """[N, D]: ends the journey of `send`, or makes all of it where a compiler kept `packed_SD` to do this again, for
    which it is given what `send` was."""
    resume(packed_SD, x_TD, token_of_row_S, splits, group)
    return end(packed_SD)


def resume(
    packed_SD: Tensor, x_TD: Tensor | None, token_of_row_S: Tensor | None, splits: Tensor | None, group: str
) -> Tensor:
    """What the journey of `send` will bring, [N, D], of which so far only what stays here is there."""
    if _key(packed_SD) not in _under_way:
        assert x_TD is not None  # nothing is computed twice in a backward pass
        assert token_of_row_S is not None
        split = split_of(splits, group, len(packed_SD))
        _begin_sending(packed_SD, x_TD, token_of_row_S, split, group)
    return _under_way[_key(packed_SD)][2]


@op("moelm::send_back", fake=lambda y_ND, _, n_rows, __: y_ND.new_empty(n_rows, y_ND.shape[1]), recordable=False)
def send_back(y_ND: Tensor, splits: Tensor | None, n_rows: int, group: str) -> Tensor:
    """[S, D], which will hold what comes back: N D elements sent, out of a copy, since a compiler may give the memory
    of `y_ND` to others at once."""
    split, landing_SD = split_of(splits, group, n_rows), y_ND.new_empty(n_rows, y_ND.shape[1])
    begin_sending_back(landing_SD, split, group, y_ND[split.stay :].clone())
    landing_SD[: split.stay] = y_ND[: split.stay]
    return landing_SD


def begin_sending_back(landing_SD: Tensor, split: Split, group: str, y_XD: Tensor) -> None:
    """Of received tokens those that came from other ranks, and whatever follows them."""
    y_XD = y_XD.contiguous()
    handle = dist.all_to_all_single(
        landing_SD[split.stay :],
        y_XD[: sum(split.received)],
        split.sent,
        split.received,
        group=_groups[group],
        async_op=True,
    )
    _under_way[_key(landing_SD)] = handle, y_XD, landing_SD


@op(
    "moelm::gather_home",
    fake=lambda landing_SD, rows_TP, _: landing_SD.new_empty(len(rows_TP), landing_SD.shape[1]),
    recordable=False,
)
def gather_home(landing_SD: Tensor, row_of_rank_TP: Tensor, ends_P: Tensor) -> Tensor:
    """y [T, D]: ends the journey of `send_back`, and adds up each token's rows in the order of ranks."""
    if _key(landing_SD) in _under_way:  # or it has ended: a compiler kept `landing_SD` to do this again
        end(landing_SD)
    T, D = len(row_of_rank_TP), landing_SD.shape[1]
    if not len(landing_SD):
        return landing_SD.new_zeros(T, D)
    if HAS_TRITON and landing_SD.is_cuda:
        return gather_sum(landing_SD, row_of_rank_TP, ends_P)
    y_TD = torch.zeros(T, D, device=landing_SD.device)
    for row_T in row_of_rank_TP.unbind(1):
        sent_T1 = (row_T < ends_P[-1]).unsqueeze(1)
        y_TD += torch.where(sent_T1, landing_SD.index_select(0, row_T.clamp(max=len(landing_SD) - 1)), 0.0)
    return y_TD.to(landing_SD.dtype)


# ---------------------------------------------------------------------------------------- derivatives


class _GatherGates(torch.autograd.Function):
    """gates [V, K] in the order of rows, of those that all ranks sent, in the order of ranks. A choice has its gradient
    on the one rank with its expert, so that the sum over ranks is exact."""

    @staticmethod
    def forward(
        ctx: Any,
        gates_TK: Tensor,
        sent_VK: Tensor,
        token_of_row_V: Tensor,
        row_of_token_V: Tensor,
        here_VK: Tensor,
        group: str,
    ) -> Tensor:
        ctx.save_for_backward(row_of_token_V, here_VK)
        ctx.rest = gates_TK.shape, group
        return sent_VK.index_select(0, token_of_row_V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VK: Tensor) -> tuple[Tensor | None, ...]:
        shape_TK, group = ctx.rest
        row_of_token_V, here_VK = ctx.saved_tensors
        returned_VK = return_gates(grad_VK, row_of_token_V, here_VK, group)
        return returned_VK.view(-1, *shape_TK).sum(0), None, None, None, None, None


class _Trim(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates_VK: Tensor,
        ids_VK: Tensor,
        row_of_choice_VK: Tensor,
        choice_of_row: Tensor,
        n_tokens: int,
        n_rows: int,
    ) -> tuple[Tensor, ...]:
        ctx.n_all = gates_VK.shape[0]
        gates_NK, *trimmed = trim(gates_VK, ids_VK, row_of_choice_VK, choice_of_row, n_tokens, n_rows)
        ctx.mark_non_differentiable(*trimmed)
        return gates_NK, *trimmed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        rest = grad_NK.new_zeros(ctx.n_all - grad_NK.shape[0], grad_NK.shape[1])
        return torch.cat([grad_NK, rest]), None, None, None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        token_of_row_S: Tensor,
        row_of_rank_TP: Tensor,
        ends_P: Tensor,
        splits: Tensor | None,
        group: str,
    ) -> Tensor:
        ctx.save_for_backward(row_of_rank_TP, ends_P)
        return send(x_TD, token_of_row_S, splits, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        return gather_home(grad_SD, *ctx.saved_tensors), None, None, None, None, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed_SD: Tensor,
        x_TD: Tensor,
        token_of_row_S: Tensor,
        splits: Tensor | None,
        n_rows: int,
        group: str,
    ) -> Tensor:
        ctx.save_for_backward(splits)
        ctx.rest = packed_SD.shape[0], group
        return receive(packed_SD, x_TD, token_of_row_S, splits, n_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return send_back(grad_ND, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, splits: Tensor | None, n_rows: int, group: str) -> Tensor:
        ctx.save_for_backward(splits)
        ctx.rest = y_ND.shape[0], group
        return send_back(y_ND, splits, n_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        return receive(grad_SD, None, None, *ctx.saved_tensors, *ctx.rest), None, None, None


class _GatherHome(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        landing_SD: Tensor,
        row_of_rank_TP: Tensor,
        ends_P: Tensor,
        token_of_row_S: Tensor,
        splits: Tensor | None,
        group: str,
    ) -> Tensor:
        ctx.save_for_backward(token_of_row_S, splits)
        ctx.group = group
        return gather_home(landing_SD, row_of_rank_TP, ends_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        token_of_row_S, splits = ctx.saved_tensors
        return send(grad_TD, token_of_row_S, splits, ctx.group), None, None, None, None, None

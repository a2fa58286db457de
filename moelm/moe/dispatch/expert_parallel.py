"""Experts on several ranks: a token travels once to each rank that holds any of its experts, and one sum comes back.

Beside the suffixes of `moe/types.py`:

    P ranks that share the experts    N tokens received by this rank    J = min(K, E / P) choices of a received token
    S tokens sent by it, one for each of a token's ranks: the other ranks' in their order, then those that stay

Received tokens begin with those that stayed, which never wait for a link. S and N depend on the data. The host learns
them in one exchange of counts a layer, and waits for it: the only wait here, once for the forward and the backward
pass. Shapes inside what is compiled are unbacked symbols, so no number of tokens compiles anything anew.

On [S, D] tensors a journey is under way between two of the four ops below: `send` (T to S) begins one that `receive`
(S to N) ends, `send_back` (N to S) begins one that `gather_home` (S to T) ends. What the layer does between the two
overlaps it. The gradient goes the same ways back: the derivative of each op is the one that begins or ends the
opposite journey. Rows are added in the order of ranks. `fused.py` ends one journey and begins the other inside of its
ops, with products of tokens that stay in between.

Messages of a group travel one after the other, so the small one about choices goes ahead of the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelm.moe.dispatch.dropless import Permutation, sort_by_expert, sort_method
from moelm.moe.kernels import HAS_TRITON
from moelm.moe.ops import op
from moelm.moe.types import TokenChoice

if HAS_TRITON:
    from moelm.moe.kernels.rows import gather_sum

STEPS = 64  # experts get multiples of T / 64 tokens and T K / 64 rows, so that memory of the same size is there again
_groups: dict[str, dist.ProcessGroup] = {}  # by the name that the ops are given
_under_way: dict[int, tuple[Any, Tensor, Tensor]] = {}  # storage of the [S, D] tensor -> handle, what was sent, result


class Journey(NamedTuple):
    """Where a layer's tokens go, and the first of them on their way."""

    packed_SD: Tensor  # under way to the ranks
    row_of_rank_TP: Tensor  # int32 row among S of what token t sends to rank p; past the last one if nothing
    ends_P: Tensor  # int32 ends of the ranks' rows
    token_of_row_S: Tensor  # int32
    local: TokenChoice  # what this rank receives: gates [N, J], local ids [N, J]; its "none" is E / P
    plan: Permutation  # of the local choices; hardly any "none" has a row
    splits: Tensor  # int64 on the CPU [sent or received, P, tokens or choices]


class ExpertParallel:
    """What a layer sends to the ranks of `group` and gets back. Rank p holds the experts p E/P ... (p + 1) E/P - 1.

    Holds no parameters. All ranks call its methods equally often, in one order, with any number of tokens, 0 too.
    """

    def __init__(self, group: dist.ProcessGroup, n_experts: int) -> None:
        self.group = group.group_name
        self.n_ranks = group.size()
        self.n_experts = n_experts
        self.n_local = n_experts // self.n_ranks
        self.rank = group.rank()
        _groups[self.group] = group

    def send(self, x_TD: Tensor, routing: TokenChoice) -> Journey:
        """Begins the journey of x, in its dtype. `routing` names experts by their global ids."""
        P, (ids_TK, gates_TK) = self.n_ranks, routing
        n_slots = min(ids_TK.shape[1], self.n_local)
        ranks_P = torch.arange(P, device=ids_TK.device)
        seats_P = torch.where(ranks_P == self.rank, P - 1, ranks_P - (ranks_P > self.rank).long())  # own rows are last
        rank_TK = ids_TK // self.n_local  # P for "none"
        on_rank_TKP = rank_TK.unsqueeze(-1) == ranks_P
        goes_TP = on_rank_TKP.any(1)
        trips = sort_by_expert(torch.where(goes_TP, seats_P, P), P)
        counts_P2 = torch.stack([goes_TP.sum(0), on_rank_TKP.sum((0, 1))], 1)
        known_TK = rank_TK.clamp(max=P - 1)
        row_TK = trips.row_of_choice_TK.gather(1, known_TK)
        slot_TK = on_rank_TKP.cumsum(1).gather(2, known_TK.unsqueeze(-1)).squeeze(-1) - 1  # k-th of those on its rank
        place_TK = torch.where(rank_TK < P, row_TK * n_slots + slot_TK, -1)  # among the S * J of what is sent
        # all that can be is queued before the host waits
        message_MX = _message(ids_TK % self.n_local, gates_TK.detach().float(), place_TK, P, n_slots, self.n_local)
        splits, token_of_row_S = exchange_counts(counts_P2, trips.choice_of_row_R, self.group)
        gates_NJ, ids_NJ, *rows = _SendChoices.apply(
            gates_TK.float(), message_MX, place_TK, splits, self.n_local, self.group
        )
        row_of_choice_NJ, choice_of_row_R, offsets_E = rows
        plan = Permutation(ids_NJ, row_of_choice_NJ, choice_of_row_R, ids_NJ != self.n_local, offsets_E)
        packed_SD = _Send.apply(x_TD, token_of_row_S, trips.row_of_choice_TK, trips.offsets_E, splits, self.group)
        here = trips.row_of_choice_TK, trips.offsets_E, token_of_row_S
        return Journey(packed_SD, *here, TokenChoice(ids_NJ, gates_NJ), plan, splits)

    def receive(self, journey: Journey) -> tuple[Tensor, TokenChoice, Permutation]:
        """(x [N, D], choices [N, J] of local experts, their rows): a batch for the local experts."""
        n_rows = journey.local.gates_TK.shape[0]
        x_ND = _Receive.apply(journey.packed_SD, journey.splits, n_rows, self.group)
        return x_ND, journey.local, journey.plan

    def send_back(self, y_ND: Tensor, journey: Journey) -> Tensor:
        """Begins the journey home of y: [S, D], for `bring_home`."""
        landing_SD: Tensor = _SendBack.apply(y_ND, journey.splits, journey.packed_SD.shape[0], self.group)
        return landing_SD

    def bring_home(self, landing_SD: Tensor, journey: Journey) -> Tensor:
        """y [T, D]: the sum of what the ranks made of a token; 0 for one without a choice."""
        _, row_of_rank_TP, ends_P, token_of_row_S, _, _, splits = journey
        y_TD: Tensor = _GatherHome.apply(landing_SD, row_of_rank_TP, ends_P, token_of_row_S, splits, self.group)
        return y_TD


# ------------------------------------------------------------------------------------------------- ops


class Split(NamedTuple):
    """How many tokens stay on this rank; are sent to each, and come from each, 0 for itself."""

    stay: int
    sent: list[int]
    received: list[int]


def _split(splits: Tensor, group: str) -> Split:
    sent, received = splits[..., 0].tolist()
    rank = _groups[group].rank()
    stay, sent[rank], received[rank] = sent[rank], 0, 0
    return Split(stay, sent, received)


def _go(message_SX: Tensor, result_NX: Tensor, split: Split, group: str, **options: Any) -> Any:
    """Each row to its rank: S rows to the first N of `result_NX`."""
    stay, n_sent, n_received = split
    n = sum(n_sent)
    there_NX = result_NX[stay : stay + sum(n_received)]
    handle = dist.all_to_all_single(there_NX, message_SX[:n], n_received, n_sent, group=_groups[group], **options)
    result_NX[:stay] = message_SX[n:]
    return handle


def _go_back(message_NX: Tensor, result_SX: Tensor, split: Split, group: str, **options: Any) -> Any:
    """The opposite, of what does not stay."""
    n_sent, n_received = split.sent, split.received
    here_SX = result_SX[: sum(n_sent)]
    return dist.all_to_all_single(here_SX, message_NX, n_sent, n_received, group=_groups[group], **options)


def _empty_counts(sent_P2: Tensor, choice_of_row_R: Tensor, group: str) -> tuple[Tensor, Tensor]:
    n_sent = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(2, *sent_P2.shape, dtype=torch.int64, device="cpu"), choice_of_row_R.new_empty(n_sent)


@op("moelm::exchange_counts", fake=_empty_counts, recordable=False)
def exchange_counts(sent_P2: Tensor, choice_of_row_R: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """(splits, token_of_row_S): `sent_P2` with what each rank sends here, on the CPU, so that the host waits; and which
    token lies in each row that is sent."""
    sent_P2 = sent_P2.contiguous()
    received_P2 = torch.empty_like(sent_P2)
    dist.all_to_all_single(received_P2, sent_P2, group=_groups[group])
    splits = torch.stack([sent_P2, received_P2]).cpu()
    return splits, choice_of_row_R[: int(splits[0, :, 0].sum())] // len(sent_P2)


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
def send(x_TD: Tensor, token_of_row_S: Tensor, splits: Tensor, group: str) -> Tensor:
    """What begins its journey, [S, D]: S D elements read, written and sent, but for those that stay on this rank."""
    packed_SD = x_TD.index_select(0, token_of_row_S)
    _begin_sending(packed_SD, splits, _n_received(splits, len(x_TD)), group)
    return packed_SD


def _n_received(splits: Tensor, n_tokens: int) -> int:
    """N, in steps."""
    return _in_steps(int(splits[1, :, 0].sum()), n_tokens)


def _in_steps(n: int, most: int) -> int:
    step = max(1, most // STEPS)
    return -(-n // step) * step


def _begin_sending(packed_SD: Tensor, splits: Tensor, n_rows: int, group: str) -> None:
    result_ND = packed_SD.new_empty(n_rows, packed_SD.shape[1])
    handle = _go(packed_SD, result_ND, _split(splits, group), group, async_op=True)
    _under_way[_key(packed_SD)] = handle, packed_SD, result_ND


@op(
    "moelm::receive",
    fake=lambda packed_SD, _, n_rows, __: packed_SD.new_empty(n_rows, packed_SD.shape[1]),
    recordable=False,
)
def receive(packed_SD: Tensor, splits: Tensor, n_rows: int, group: str) -> Tensor:
    """[N, D]: ends the journey of `send`, or makes all of it where a compiler kept `packed_SD` to do this again."""
    resume(packed_SD, splits, n_rows, group)
    return end(packed_SD)


def resume(packed_SD: Tensor, splits: Tensor, n_rows: int, group: str) -> Tensor:
    """What the journey of `send` will bring, [N, D], of which so far only what stays here is there."""
    if _key(packed_SD) not in _under_way:
        _begin_sending(packed_SD, splits, n_rows, group)
    return _under_way[_key(packed_SD)][2]


@op("moelm::send_back", fake=lambda y_ND, _, n_rows, __: y_ND.new_empty(n_rows, y_ND.shape[1]), recordable=False)
def send_back(y_ND: Tensor, splits: Tensor, n_rows: int, group: str) -> Tensor:
    """[S, D], which will hold what comes back: N D elements sent. `y_ND` must stay as it is until `gather_home`;
    compilers give its memory only to tensors of N rows, of which there are no others."""
    landing_SD = y_ND.new_empty(n_rows, y_ND.shape[1])
    stay, _ = staying(splits, group)
    begin_sending_back(landing_SD, splits, group, y_ND[stay:])
    landing_SD[n_rows - stay :] = y_ND[:stay]
    return landing_SD


def staying(splits: Tensor, group: str) -> tuple[int, int]:
    """How many tokens stay on this rank, and how many of their choices."""
    n_tokens, n_choices = splits[0, _groups[group].rank()].tolist()
    return n_tokens, n_choices


def begin_sending_back(landing_SD: Tensor, splits: Tensor, group: str, y_XD: Tensor) -> None:
    """Of received tokens those that came from other ranks, and whatever follows them."""
    split, y_XD = _split(splits, group), y_XD.contiguous()
    handle = _go_back(y_XD[: sum(split.received)], landing_SD, split, group, async_op=True)
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


def _message(ids_TK: Tensor, gates_TK: Tensor, place_TK: Tensor, P: int, J: int, none: int) -> Tensor:
    """int32 [T P, 2 J], of which the first S rows are sent: ids, and the bits of gates, in their places."""
    end = place_TK.shape[0] * P * J  # of the places; what is not sent goes behind it
    place_R = torch.where(place_TK < 0, end, place_TK).flatten()
    pairs = (ids_TK.int(), none), (gates_TK, 0.0)
    placed = [values.new_full((end + 1,), rest).scatter(0, place_R, values.flatten())[:end] for values, rest in pairs]
    return torch.cat([placed[0].view(-1, J), placed[1].view(torch.int32).view(-1, J)], 1)


def _empty_choices(
    message_MX: Tensor, n_choices: int, splits: Tensor, n_local: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    rows_NJ = message_MX.new_empty(context.new_dynamic_size(), message_MX.shape[1] // 2)
    gates_NJ, ids_NJ = (torch.empty_like(rows_NJ, dtype=dtype) for dtype in (torch.float32, torch.int64))
    return gates_NJ, ids_NJ, rows_NJ, rows_NJ.new_empty(context.new_dynamic_size()), rows_NJ.new_empty(n_local)


@op("moelm::send_choices", fake=_empty_choices, recordable=False)
def send_choices(
    message_MX: Tensor, n_choices: int, splits: Tensor, n_local: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(gates [N, J] float32, local ids [N, J], row of choice [N, J], choice of row [R], ends [E / P]) of what this rank
    receives, of T K = `n_choices` on each. N and R in steps: choices of tokens past the last are "none". 2 J S
    four-byte elements sent."""
    split, J = _split(splits, group), message_MX.shape[1] // 2
    n = split.stay + sum(split.received)
    n_tokens = len(message_MX) // len(split.sent)
    message_NX = message_MX.new_empty(_in_steps(n, n_tokens), 2 * J)
    message_NX[n:, :J], message_NX[n:, J:] = n_local, 0
    _go(message_MX[: split.stay + sum(split.sent)], message_NX, split, group)
    ids_NJ, gates_NJ = message_NX[:, :J].long(), message_NX[:, J:].contiguous().view(torch.float32)
    row_of_choice_NJ, choice_of_row_R, offsets_E = sort_method(ids_NJ)(ids_NJ, n_local)
    n_rows = _in_steps(int(splits[1, :, 1].sum()), n_choices)
    return gates_NJ, ids_NJ, row_of_choice_NJ, choice_of_row_R[:n_rows], offsets_E


@op("moelm::return_choices", fake=lambda grad_NJ, place_TK, *_: grad_NJ.new_empty(place_TK.shape), recordable=False)
def return_choices(grad_NJ: Tensor, place_TK: Tensor, splits: Tensor, group: str) -> Tensor:
    """[T, K], 0 for "none": each choice's value of a received [N, J] tensor, from the rank that has it. J N elements
    sent; what is in a slot without a choice goes unread."""
    split, grad_NJ = _split(splits, group), grad_NJ.contiguous()
    n = sum(split.sent)
    grad_SJ = grad_NJ.new_empty(n + split.stay, grad_NJ.shape[1])
    grad_SJ[n:] = grad_NJ[: split.stay]
    _go_back(grad_NJ[split.stay : split.stay + sum(split.received)], grad_SJ, split, group)
    if not len(grad_SJ):
        return grad_SJ.new_zeros(place_TK.shape)
    found_TK = grad_SJ.flatten().index_select(0, place_TK.flatten().clamp(min=0)).view(place_TK.shape)
    return torch.where(place_TK < 0, 0.0, found_TK)


# ---------------------------------------------------------------------------------------- derivatives


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        token_of_row_S: Tensor,
        row_of_rank_TP: Tensor,
        ends_P: Tensor,
        splits: Tensor,
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
    def forward(ctx: Any, packed_SD: Tensor, splits: Tensor, n_rows: int, group: str) -> Tensor:
        ctx.save_for_backward(splits)
        ctx.rest = packed_SD.shape[0], group
        return receive(packed_SD, splits, n_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return send_back(grad_ND, *ctx.saved_tensors, *ctx.rest), None, None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, splits: Tensor, n_rows: int, group: str) -> Tensor:
        ctx.save_for_backward(splits)
        ctx.rest = y_ND.shape[0], group
        return send_back(y_ND, splits, n_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        return receive(grad_SD, *ctx.saved_tensors, *ctx.rest), None, None, None


class _GatherHome(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        landing_SD: Tensor,
        row_of_rank_TP: Tensor,
        ends_P: Tensor,
        token_of_row_S: Tensor,
        splits: Tensor,
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


class _SendChoices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates_TK: Tensor, message_MX: Tensor, place_TK: Tensor, splits: Tensor, n_local: int, group: str
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(place_TK, splits)
        ctx.group = group
        gates_NJ, *others = send_choices(message_MX, place_TK.numel(), splits, n_local, group)
        ctx.mark_non_differentiable(*others)
        return gates_NJ, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NJ: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        place_TK, splits = ctx.saved_tensors
        return return_choices(grad_NJ, place_TK, splits, ctx.group), None, None, None, None, None

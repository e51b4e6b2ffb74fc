"""How memory states cross ranks: the exclusive scan of segment summaries along each document.

Every exchange is called alike: `exchange(transition, A, B, chain, comm, **options)` with the
summaries (A, B) of this rank's ranges, stacked along the first dimension. It starts at once and
returns a function that waits and gives the state entering each range, None where none enters. The
backward pass is the same call with A transposed and `chain.backwards`.

What each one sends, how long it takes, and when it is chosen: docs/exchanges.md.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqpar.chain import Chain
from seqpar.comm import Communicator
from seqpar.kernels.transition import Transition

if TYPE_CHECKING:
    from seqpar.handover import Handover

States = Callable[[], list[Tensor | None]]
KIND = "state"


# (transition, A [ranges, B, H, ...] as in seqpar.kernels.transition, B [ranges, B, H, K, V], ...)
Exchange = Callable[..., States]


def through(transition: Transition, A: Tensor, B: Tensor, state: Tensor | None) -> Tensor:
    """The state that leaves a range; `state` None where none enters or its document ends there."""
    return B if state is None else transition.apply(A, state) + B


def allgather(
    transition: Transition, A: Tensor, B: Tensor, chain: Chain, comm: Communicator
) -> States:
    """One all-gather of every summary; each rank folds what it needs (LASP-2, arXiv 2502.07563)."""
    pending = comm.all_gather(_pack(A, B), KIND)

    def states() -> list[Tensor | None]:
        gathered_A, gathered_B = _unpack(pending.wait(), A, B)  # [P, ranges, ...]
        entering: list[Tensor | None] = [None] * len(B)
        for position, slot in chain.of(comm.rank):
            state = None
            for place in chain.places[chain.begin(position) : position]:
                state = through(transition, gathered_A[place], gathered_B[place], state)
            entering[slot] = state
        return entering

    return states


def allscan(
    transition: Transition,
    A: Tensor,
    B: Tensor,
    chain: Chain,
    comm: Communicator,
    blocks: int = 1,
) -> States:
    """States flow from range to range cut in blocks, so that all hops work at once (ZeCO, arXiv
    2507.01004): through each other's memory between GPUs of a node, else as messages of the ring.

    The cut is along V: columns of the state are independent for every transition, so All-Scan
    serves dense ones as well.
    """
    direct = handover(comm, B)
    if direct is None:
        return ring(transition, A, B, chain, comm, blocks)
    return comm.background(partial(direct.scan, A, B, chain, comm, KIND), B.device, KIND)


def handover(comm: Communicator, B: Tensor) -> "Handover | None":
    """What hands on states like B [ranges, ...] through peers' memory; None where there is none.

    All ranks ask alike. The first time for a shape they make room, and wait for each other.
    """
    if not B.is_cuda or find_spec("triton") is None:
        return None
    from seqpar.handover import handover_of  # triton only where it is used

    return handover_of(comm, B)


def ring(
    transition: Transition,
    A: Tensor,
    B: Tensor,
    chain: Chain,
    comm: Communicator,
    blocks: int = 1,
) -> States:
    """States flow from range to range, S_out = A S_in + B applied at each hop (LASP, arXiv
    2404.02882), in `blocks` messages each. A never travels.
    """
    widths = [len(part) for part in torch.arange(B.shape[-1]).chunk(blocks)]

    def work() -> list[Tensor | None]:
        entering: list[Tensor | None] = [None] * len(B)
        handed: list[Tensor] = []  # from one range of this rank to the next
        sending = []
        for position, slot in chain.of(comm.rank):
            arrived = []
            for part in B[slot].split(widths, -1):
                state = None
                if chain.linked[position]:
                    source = chain.owner(position - 1)
                    state = handed.pop(0) if source == comm.rank else _receive(comm, part, source)
                    arrived.append(state)
                if chain.sends(position):
                    carried = state if chain.through[position] else None
                    out = through(transition, A[slot], part, carried)
                    target = chain.owner(position + 1)
                    if target == comm.rank:
                        handed.append(out)
                    else:
                        sending.append(_send(comm, out, target))
            entering[slot] = torch.cat(arrived, -1) if arrived else None
        _finish(work for work, _ in sending)
        return entering

    return comm.background(work, B.device, KIND)


def doubling(
    transition: Transition, A: Tensor, B: Tensor, chain: Chain, comm: Communicator
) -> States:
    """log2 rounds: in round d, each range receives the composed summary of the d ranges that end d
    places before it (Hillis and Steele, 1986). A travels with B.
    """

    def work() -> list[Tensor | None]:
        mine = chain.of(comm.rank)
        upto = {i: (A[slot], B[slot]) for i, slot in mine}  # ranges up to and with i
        before: dict[int, tuple[Tensor, Tensor]] = {}  # ranges before i
        distance = 1
        while distance < len(chain):
            sends = [
                (_pack(upto[i][0][None], upto[i][1][None])[0], chain.owner(i + distance), i)
                for i, _ in mine
                if i + distance < len(chain) and chain.begin(i + distance) <= i
            ]
            wanted = [i for i, _ in mine if chain.begin(i) <= i - distance]
            outs = {i: B.new_empty(A.shape[1:].numel() + B.shape[1:].numel()) for i in wanted}
            local = {i + distance: x for x, owner, i in sends if owner == comm.rank}
            works = comm.send_receive(
                [(x, owner) for x, owner, _ in sends if owner != comm.rank],
                [(outs[i], chain.owner(i - distance)) for i in wanted if i not in local],
                KIND,
            )
            _finish(works)
            for i in wanted:
                got_A, got_B = _unpack(local.get(i, outs[i])[None], A, B)
                first = got_A[0], got_B[0]
                before[i] = _compose(transition, before[i], first) if i in before else first
                if chain.through[i]:
                    upto[i] = _compose(transition, upto[i], first)
            distance *= 2
        return _by_slot(len(B), {slot: before[i][1] for i, slot in mine if i in before})

    return comm.background(work, B.device, KIND)


def twolevel(
    transition: Transition,
    A: Tensor,
    B: Tensor,
    chain: Chain,
    comm: Communicator,
    nodes: Sequence[int],
) -> States:
    """Within nodes every range hands its summary to those after it; one state a node crosses over.

    A node's last range receives the state that enters the node, sends on the one that leaves it,
    and hands the first to its neighbours. `nodes` gives the node of each rank.
    """
    runs = [
        list(positions)
        for _, positions in groupby(range(len(chain)), lambda i: nodes[chain.owner(i)])
    ]

    def work() -> list[Tensor | None]:
        slots = dict(chain.of(comm.rank))
        summaries = _share(A, B, chain, comm, runs)
        entering: dict[int, Tensor] = {}
        leaving: Tensor | None = None
        sending = []
        for node, following in zip_longest(runs, runs[1:]):
            first, last = node[0], node[-1]
            leader = chain.owner(last)
            fed = [i for i in node if chain.begin(i) < first]
            arrived: Tensor | None = None
            if fed and leader == comm.rank:
                source = chain.owner(first - 1)
                arrived = leaving if source == comm.rank else _receive(comm, B[0], source)
            elif any(i in slots for i in fed):
                arrived = _receive(comm, B[0], leader)
            for i in (i for i in node if i in slots):
                state = arrived if i in fed else None
                for j in range(max(chain.begin(i), first), i):
                    state = through(transition, *summaries[j], state)
                if state is not None:
                    entering[slots[i]] = state
            if leader != comm.rank:
                continue
            if following and chain.sends(last):
                slot = slots[last]
                carried = entering.get(slot) if chain.through[last] else None
                leaving = through(transition, A[slot], B[slot], carried)
                target = chain.owner(following[-1])
                if target != comm.rank:
                    sending.append(_send(comm, leaving, target))
            if arrived is not None:
                neighbours = sorted({chain.owner(i) for i in fed} - {comm.rank})
                sending += [_send(comm, arrived, neighbour) for neighbour in neighbours]
        _finish(work for work, _ in sending)
        return _by_slot(len(B), entering)

    return comm.background(work, B.device, KIND)


EXCHANGES: dict[str, Exchange] = {
    "allgather": allgather,
    "ring": ring,
    "allscan": allscan,
    "doubling": doubling,
    "twolevel": twolevel,
}


def _share(
    A: Tensor, B: Tensor, chain: Chain, comm: Communicator, runs: list[list[int]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The summaries this rank needs of positions on its own node, its own included."""
    slots = dict(chain.of(comm.rank))
    summaries = {i: (A[slot], B[slot]) for i, slot in slots.items()}
    sends, receives = [], []
    for node in runs:
        for i in node:
            needing = {chain.owner(j) for j in node if chain.begin(j) <= i < j}
            if i in slots:
                packed = _pack(A[slots[i], None], B[slots[i], None])[0]
                sends += [(packed, rank) for rank in sorted(needing - {comm.rank})]
            elif comm.rank in needing:
                receives.append((i, B.new_empty(A.shape[1:].numel() + B.shape[1:].numel())))
    works = comm.send_receive(sends, [(out, chain.owner(i)) for i, out in receives], KIND)
    _finish(works)
    for i, out in receives:
        got_A, got_B = _unpack(out[None], A, B)
        summaries[i] = got_A[0], got_B[0]
    return summaries


def _compose(
    transition: Transition, later: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    (A2, B2), (A1, B1) = later, first
    return transition.product(A2, A1), transition.apply(A2, B1) + B2


def _pack(A: Tensor, B: Tensor) -> Tensor:
    """[ranges, ...] each -> [ranges, elements of one A and one B]."""
    return torch.cat([A.flatten(1), B.flatten(1)], 1)


def _unpack(packed: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """[..., elements] -> A and B of one range each, [..., *shape]."""
    one_A, one_B = packed.split([A.shape[1:].numel(), B.shape[1:].numel()], -1)
    lead = packed.shape[:-1]
    return one_A.view(lead + A.shape[1:]), one_B.view(lead + B.shape[1:])


def _send(comm: Communicator, x: Tensor, to: int) -> tuple[Any, Tensor]:
    x = x.contiguous()
    return comm.send(x, to, KIND), x  # x must live until the work is done


def _receive(comm: Communicator, like: Tensor, source: int) -> Tensor:
    out = like.new_empty(like.shape)
    comm.receive(out, source, KIND).wait()
    return out


def _finish(works: Iterable[Any]) -> None:
    for work in works:
        work.wait()


def _by_slot(ranges: int, entering: dict[int, Tensor]) -> list[Tensor | None]:
    return [entering.get(slot) for slot in range(ranges)]

"""How memory states cross ranks: the scan of segment summaries along each document.

An exchange takes the summary (A, B) of each range of this rank, stacked along the first dimension,
and `routes`: for each range, the places (rank, range) whose summaries fold, in that order, into the
state it needs. It starts at once and returns a function that waits and gives those states. The
backward pass is the same call with A transposed and the routes of the other direction.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqpar.comm import Communicator
from seqpar.kernels.transition import Transition

Routes = Sequence[Sequence[tuple[int, int]]]
# one state [B, H, K, V] for each range, None where no state enters
States = Callable[[], list[Tensor | None]]


def allgather(
    transition: Transition, A: Tensor, B: Tensor, routes: Routes, comm: Communicator
) -> States:
    """One all-gather of every range's (A, B); each rank folds what it needs (arXiv 2502.07563).

    A [ranges, B, H, ...] as in `seqpar.kernels.transition`, B [ranges, B, H, K, V].
    """
    pending = comm.all_gather(torch.cat([A.flatten(1), B.flatten(1)], 1), kind="state")

    def states() -> list[Tensor | None]:
        gathered = pending.wait()  # [P, ranges, size of A + size of B]
        parts = gathered.split([A[0].numel(), B[0].numel()], -1)
        all_A = parts[0].unflatten(-1, A.shape[1:]) if A.numel() else A.expand(comm.size, *A.shape)
        all_B = parts[1].unflatten(-1, B.shape[1:])
        folded: list[Tensor | None] = []
        for route in routes:
            if not route:
                folded.append(None)
                continue
            state = all_B[route[0]]
            for place in route[1:]:
                state = transition.apply(all_A[place], state) + all_B[place]
            folded.append(state)
        return folded

    return states


EXCHANGES = {"allgather": allgather}

"""What a layer needs to know to work on one shard of a sequence: group, layout, exchange."""

from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.checks import digest
from seqpar.comm import Communicator
from seqpar.cost import Choice, Links, choose, nodes_of
from seqpar.exchange import EXCHANGES
from seqpar.kernels.once import Once
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.transition import Identity
from seqpar.layout import Layout


class SequenceParallel(Once):
    """One sequence cut over the ranks of a process group. Passed explicitly; there is no global.

    Args:
        group: the process group whose ranks share the sequence (Megatron's context-parallel group,
            or any other). None: the default group, or nobody when the layout has one rank.
        layout: which rank holds which tokens.
        exchange: how memory states cross ranks: "auto", or a name in `seqpar.exchange.EXCHANGES`.
        comm: a communicator to go on counting with, instead of a new one for `group`.
        links: what "auto" reckons with (`seqpar.cost.measure`, or given, alike on all ranks).
        segment_tokens: cut longer runs of one rank into pieces of at most so many tokens, which
            linear layers work on side by side; None leaves it to the kernels.

    Attributes: layout, exchange, links; comm, the counted communicator; rank, in the group.

    Raises:
        ValueError: the group does not hold this rank, its size is not the layout's, or the
            exchange is unknown.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        layout: Layout | None = None,
        exchange: str = "auto",
        *,
        comm: Communicator | None = None,
        links: Links | None = None,
        segment_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if layout is None:
            raise ValueError("layout=None: a Layout is needed, it says which tokens a rank holds")
        if exchange != "auto" and exchange not in EXCHANGES:
            raise ValueError(
                f"exchange={exchange!r} must be one of {', '.join(['auto', *EXCHANGES])}"
            )
        if comm is None:
            comm = Communicator(_group(group, layout))
        if comm.rank < 0:
            raise ValueError("group does not hold this rank: only its members may build this")
        if comm.size != layout.world_size:
            raise ValueError(
                f"layout has world_size={layout.world_size}, the process group has {comm.size} "
                f"ranks; build the Layout with world_size={comm.size}"
            )
        links = links or Links(nodes_of(comm))
        if len(links.nodes) != comm.size:
            raise ValueError(
                f"links.nodes names the nodes of {len(links.nodes)} ranks, "
                f"the group has {comm.size}"
            )
        self.layout, self.exchange, self.comm, self.rank = layout, exchange, comm, comm.rank
        self.links = links
        if segment_tokens is not None and segment_tokens < 1:
            raise ValueError(f"segment_tokens={segment_tokens} must be None or from 1; nearest: 1")
        self.segment_tokens = segment_tokens

    @cached_property
    def exchanges(self) -> bool:
        """Whether any rank hands a state to another."""
        return any(self.layout.chain.linked)

    def pieces(self, limit: int | None) -> Pieces:
        """This rank's segments, cut to at most `limit` tokens."""

        def make() -> Pieces:
            ranges = [
                [piece for segment in segments for piece in segment.split(limit)]
                for segments in self.layout.segments(self.rank)
            ]
            flat = [piece for found in ranges for piece in found]
            ends = accumulate(map(len, ranges), initial=0)
            return Pieces(
                [(piece.local.start, piece.local.stop) for piece in flat],
                [piece.continues for piece in flat],
                [piece.continued for piece in flat],
                list(pairwise(ends)),
            )

        return self.once(("pieces", limit), make)

    def choice(self, A_bytes: int, B_bytes: int, work: float = 0.0) -> Choice:
        """The exchange for summaries (A, B) of these sizes; print it to see why.

        work: operations a token that a layer does while the exchange travels.
        """

        def make() -> Choice:
            rate = self.links.work_rate
            hidden = work * min(self.layout.shard_sizes) / rate if rate else 0.0
            return choose(self.exchange, self.layout.chain, self.links, A_bytes, B_bytes, hidden)

        return self.once(("choice", A_bytes, B_bytes, work), make)

    def warm_up(self, device: torch.device) -> None:
        """Make the connections that layers of this layout's kind use, with NCCL seconds' work, now
        and not in their first call. All ranks call it; it waits on the host.

        What is left to the first call: room in peers' memory for states of its shape, and kernels.
        """
        size = self.comm.size
        if size == 1:
            return
        one = [1] * size
        self.comm.all_to_all(torch.zeros(size, device=device), one, one, "warm-up").wait()
        layout = Layout(2 * size, size, self.layout.kind)  # one document: every range is linked
        B = torch.zeros(len(layout.ranges(self.rank)), 1, 1, 16, 16, device=device)
        for name in EXCHANGES if self.exchange == "auto" else (self.exchange,):
            options = choose(name, layout.chain, self.links, 0, 0).options
            for chain in (layout.chain, layout.chain.backwards):
                EXCHANGES[name](Identity(), B[..., :0, :0], B, chain, self.comm, **options)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def enter(self, call: str, **tensors: Tensor) -> None:
        """Make sure that all ranks are about to make this call, with the same shapes and layout.

        tensors: [B, T, ...] each; the number of tokens is the layout's affair. Every differentiable
        function calls this before its first exchange, forward and backward. It is work of the host
        alone; a CUDA graph leaves it out when it is replayed.

        Raises:
            ValueError, ExchangeError: as `Communicator.reach`.
        """
        if self.comm.size == 1:
            return

        def announced() -> str:
            shapes = (
                f"{name} [{', '.join([str(x.shape[0]), 'T', *map(str, x.shape[2:])])}] {x.dtype}"
                for name, x in tensors.items()
            )
            return f"{call}({', '.join(shapes)})"

        self.once("agreed on", self._agree)
        forms = ((name, x.shape[0], x.shape[2:], x.dtype) for name, x in tensors.items())
        self.comm.reach(self.once(("call", call, *forms), announced))

    def _agree(self) -> None:
        self.comm.reach(
            f"{self.layout!r} ({self.layout.digest}), exchange={self.exchange}, "
            f"links {digest(self.links)}"
        )

    def check_shard(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless `x` [B, T, ...] is this rank's shard under the layout."""
        expected = self.layout.local_tokens(self.rank)
        if x.shape[1] != expected:
            raise ValueError(
                f"{name} has {x.shape[1]} tokens, {self.layout!r} gives rank {self.rank} {expected}"
            )
        if self.layout.cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(
                f"{name} has batch size {x.shape[0]}, packed documents (cu_seqlens) need 1: "
                "lay the batch end to end in one stream"
            )


@lru_cache(64)
def alone(tokens: int) -> SequenceParallel:
    """One rank with whole sequences of `tokens`; kept, for it holds what kernels look up."""
    return SequenceParallel(layout=Layout(tokens, 1))


def _group(group: dist.ProcessGroup | None, layout: Layout) -> dist.ProcessGroup | None:
    if group is not None or layout.world_size == 1:
        return group
    if not dist.is_initialized():
        raise ValueError(
            f"layout has world_size={layout.world_size} but torch.distributed is not initialised; "
            "call torch.distributed.init_process_group first"
        )
    return dist.group.WORLD

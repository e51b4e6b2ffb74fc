"""What each exchange costs on given links, and which one to take. Formulas: docs/exchanges.md."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from seqpar.chain import Chain
from seqpar.comm import Communicator
from seqpar.exchange import Exchange, allgather, allscan, handover
from seqpar.kernels.transition import Identity
from seqpar.layout import Layout

MAX_BLOCKS = 16
SIMPLER = 1.25  # how much longer a simpler exchange may take: estimates are no better
LARGE = 1 << 24  # bytes, against which a latency is small
GATHERED_HEAD_BYTES = 1 << 33


@dataclass(frozen=True)
class Links:
    """The links between the ranks of a group.

    nodes: the node of each rank. latency (seconds a message) and bandwidth (bytes/s each way) hold
    within a node; across_latency and across_bandwidth between nodes. The defaults are those of
    GPUs with NVLink and 400 Gb/s InfiniBand; `measure` gives a machine's own. work_rate (operations
    a second): how fast the layer's own work runs that hides an exchange; 0 if nothing is to be
    reckoned as hidden. gathering: seconds an all-gather of next to nothing takes; 0 for one message
    to each other rank after the other. direct: seconds a hop of All-Scan takes through peers'
    memory; 0 where it goes by messages.
    """

    nodes: tuple[int, ...]
    latency: float = 2e-5
    bandwidth: float = 3e11
    across_latency: float = 4e-5
    across_bandwidth: float = 4.5e10
    work_rate: float = 0.0
    gathering: float = 0.0
    direct: float = 0.0

    def message(self, source: int, target: int, size: float) -> float:
        """Seconds for `size` bytes from one rank to another; nothing for a rank to itself."""
        if source == target:
            return 0.0
        if self.nodes[source] == self.nodes[target]:
            return self.latency + size / self.bandwidth
        return self.across_latency + size / self.across_bandwidth

    def slowest(self, size: float) -> float:
        """Seconds for `size` bytes over the slowest kind of link in the group."""
        inside = self.latency + size / self.bandwidth
        if len(set(self.nodes)) == 1:
            return inside
        return max(inside, self.across_latency + size / self.across_bandwidth)


@dataclass(frozen=True)
class Choice:
    """An exchange, its options, and the estimates (seconds, by exchange) it was chosen from."""

    name: str
    options: dict[str, Any]
    seconds: dict[str, float]

    def __str__(self) -> str:
        rows = [
            f"{'->' if name == self.name else '  '} {name:<10} {1e6 * seconds:10.1f} us"
            for name, seconds in sorted(self.seconds.items(), key=lambda row: row[1])
        ]
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return "\n".join([f"exchange={self.name}" + (f" ({options})" if options else ""), *rows])


def choose(
    wanted: str, chain: Chain, links: Links, A_bytes: int, B_bytes: int, hidden: float = 0.0
) -> Choice:
    """The exchange `wanted`, or for "auto" the one that keeps a rank waiting least.

    A_bytes, B_bytes: the summary of one range. hidden: seconds of local work that runs meanwhile.
    All arguments must be equal on all ranks, so that all choose alike.
    """
    hops = _hops(chain, links, B_bytes)
    blocks = min(range(1, MAX_BLOCKS + 1), key=lambda n: _pipelined(chain, links, B_bytes, n))
    ranks, ranges = len(links.nodes), len(chain) // len(links.nodes)
    longest = max((i - chain.begin(i) for i in range(len(chain))), default=0)
    packed = A_bytes + B_bytes
    alone = links.slowest(0)
    allscan = _pipelined(chain, links, B_bytes, blocks)
    if links.direct:  # tiles of a state are all under way at once
        hop = replace(links, latency=links.direct)
        allscan = _hops(chain, hop, 0) + B_bytes / links.bandwidth
    seconds = {
        "allgather": (links.gathering or (ranks - 1) * alone)
        + (ranks - 1) * (links.slowest(ranges * packed) - alone),
        "ring": hops,
        "allscan": allscan,
        "doubling": math.ceil(math.log2(longest + 1)) * links.slowest(ranges * packed),
        "twolevel": _two_levels(links, ranges, packed, B_bytes),
    }
    options: dict[str, dict[str, Any]] = {
        "allscan": {"blocks": blocks},
        "twolevel": {"nodes": links.nodes},
    }
    name = wanted
    if wanted == "auto":  # the simplest of those that are about as good as the best
        exposed = {exchange: max(each - hidden, 0.0) for exchange, each in seconds.items()}
        enough = SIMPLER * min(exposed.values())
        order = ["allscan"] if links.direct else []  # one kernel, no messages, nothing packed
        name = next(each for each in [*order, *exposed] if exposed[each] <= enough)
    return Choice(name, options.get(name, {}), seconds)


def _hops(chain: Chain, links: Links, size: float) -> float:
    """The longest way of a state of `size` bytes along the chain, one hop after the other."""
    longest = arrival = 0.0
    for i in range(1, len(chain)):
        hop = links.message(chain.owner(i - 1), chain.owner(i), size)
        arrival = arrival + hop if chain.linked[i] and chain.through[i - 1] else hop
        longest = max(longest, arrival if chain.linked[i] else 0.0)
    return longest


def _pipelined(chain: Chain, links: Links, size: int, blocks: int) -> float:
    """The first block's way, then the others behind it at the pace of the slowest link."""
    return _hops(chain, links, size / blocks) + (blocks - 1) * links.slowest(size / blocks)


def _two_levels(links: Links, ranges: int, packed: int, state: int) -> float:
    nodes = sorted(set(links.nodes))
    largest = max(links.nodes.count(node) for node in nodes)
    inside = links.latency + (largest - 1) * ranges * packed / links.bandwidth
    if len(nodes) == 1:
        return inside
    across = links.across_latency + state / links.across_bandwidth
    handed_round = links.latency + (largest - 1) * state / links.bandwidth
    return inside + (len(nodes) - 1) * ranges * across + handed_round


def nodes_of(comm: Communicator, node_size: int | None = None) -> tuple[int, ...]:
    """The node of each rank of the group: `node_size` global ranks in a row are one.

    By default torchrun's LOCAL_WORLD_SIZE; without it, all ranks are on one node.
    """
    size = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if comm.group is None or not size:
        return (0,) * comm.size
    return tuple(rank // size for rank in dist.get_process_group_ranks(comm.group))


def measure(comm: Communicator, device: torch.device, node_size: int | None = None) -> Links:
    """Latency and bandwidth between neighbours, within and across nodes, of an all-gather, and of
    All-Scan through peers' memory, in well under a second (and a second more for what is first used
    here: connections, that memory, its kernels).

    Every rank of the group must call this; all get the same figures (of the slowest rank).
    """
    nodes = nodes_of(comm, node_size)

    def slowest(work: Callable[[], object]) -> float:
        """Seconds of the best of five on the slowest rank: what else the machine does is not a
        property of its links."""
        times = []
        for _ in range(6):  # the first makes connections
            comm.barrier()
            times.append(_seconds(work, device))
        best = torch.tensor(min(times[1:]), device=device)
        return comm.all_reduce(best, "max", "measure").item()

    figures: list[tuple[float, float]] = []
    for to, source in _partners(comm.rank, nodes):
        small, large = (
            slowest(partial(_shift, comm, to, source, torch.zeros(2, size // 4, device=device)))
            for size in (64, LARGE)
        )
        figures.append((small, LARGE / max(large - small, 1e-9)))
    if len(set(nodes)) == 1:
        figures[1] = figures[0]
    elif max(nodes.count(node) for node in nodes) == 1:
        figures[0] = figures[1]
    chain = Layout(comm.size, comm.size).chain
    state = torch.zeros(1, 1, 1, 16, 16, device=device)  # next to nothing

    def exchanged(start: Exchange) -> float:
        return slowest(lambda: start(Identity(), state[..., :0, :0], state, chain, comm)())

    direct = 0.0
    if handover(comm, state) is not None:
        direct = exchanged(allscan) / (comm.size - 1)
    gathering = exchanged(allgather)
    return Links(nodes, *figures[0], *figures[1], gathering=gathering, direct=direct)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a GPU, on its stream: in training the host launches ahead, as it does here while the GPU
    is kept waiting. The first of two times lets the ranks' GPUs begin the second together."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            torch.cuda._sleep(4_000_000)  # cycles, about 2 ms
            work()
            begin.record()
            work()
            end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def _partners(
    rank: int, nodes: tuple[int, ...]
) -> tuple[tuple[int | None, int | None], tuple[int | None, int | None]]:
    """(to, from) for a shift within this rank's node, and for one between nodes."""

    def cycle(members: list[int]) -> tuple[int | None, int | None]:
        if len(members) < 2 or rank not in members:
            return None, None
        at = members.index(rank)
        return members[(at + 1) % len(members)], members[at - 1]

    firsts = [nodes.index(node) for node in sorted(set(nodes))]
    return cycle([r for r, node in enumerate(nodes) if node == nodes[rank]]), cycle(firsts)


def _shift(comm: Communicator, to: int | None, source: int | None, both: torch.Tensor) -> None:
    """Hand both[0] to the next rank and get as much from the one before."""
    if to is not None and source is not None:
        comm.wait(comm.send_receive([(both[0], to)], [(both[1], source)], "measure"), "measure")


def softmax_bytes(
    method: str,
    ranks: int,
    tokens: float,
    heads: int,
    kv_heads: int,
    dim: int,
    element: int,
    trades: bool,
) -> tuple[float, float]:
    """Bytes that a rank receives in a forward pass of `softmax_attention` over `tokens` of all
    ranks: keys and values that may travel during attention, and what it has to wait for.

    trades: whether an all-gather trades queries, and outputs, with mirror ranks.
    """
    head = tokens // ranks * dim * element
    if method == "ulysses":
        dealt = 2 * heads + 2 * max(kv_heads, min(ranks, heads))  # q and o; k and v
        return 0, (ranks - 1) * head * dealt // ranks
    traded = heads * head if trades and method == "allgather" else 0
    return (ranks - 1) * 2 * kv_heads * head, traded


def choose_softmax(
    ranks: int, tokens: int, heads: int, kv_heads: int, dim: int, element: int, trades: bool
) -> str:
    """The method of `softmax_attention` that waits for the fewest bytes, forwards and backwards.

    Or the ring, where memory decides: one gathered kv head costs keys and values in the inputs'
    dtype and their gradients in fp32. Past GATHERED_HEAD_BYTES of that, only one rank's share is
    held at a time. Arguments as of `softmax_bytes`.
    """
    if ranks == 1:
        return "allgather"
    if tokens * dim * 2 * (element + 4) > GATHERED_HEAD_BYTES:
        return "ring"
    sizes = ranks, tokens, heads, kv_heads, dim, element, trades
    beside, traded = softmax_bytes("allgather", *sizes)
    # of keys and values the first half, each way, and of their gradients the last are not hidden
    gathered = beside * (1 + 2 / element) + 2 * traded
    _, dealt = softmax_bytes("ulysses", *sizes)
    return "ulysses" if heads % ranks == 0 and 2 * dealt < gathered else "allgather"

"""Time of each exchange beside what the cost model predicts, on the links of this machine.

    torchrun --nproc-per-node 4 -m tests.bench.exchange [--heads 16] [--key 128] [--value 128]

One table: family, exchange, measured and predicted microseconds (medians; the slowest rank's).
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist

from seqpar import Layout
from seqpar.comm import Communicator
from seqpar.cost import choose, measure
from seqpar.exchange import EXCHANGES
from seqpar.kernels.transition import Decay, Dense, Transition

REPEATS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key", type=int, default=128, help="key dimension K of a head")
    parser.add_argument("--value", type=int, default=128, help="value dimension V of a head")
    parser.add_argument("--node-size", type=int, default=None, help="ranks in a row that share one")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    comm = Communicator(dist.group.WORLD)
    links = measure(comm, device, args.node_size)
    name = torch.cuda.get_device_name(device) if cuda else "CPU, gloo"
    say(comm, f"{comm.size} ranks, {name}, torch {torch.__version__}")
    say(comm, f"{links}")
    say(comm, f"{'family':<10}{'exchange':<12}{'measured us':>12}{'predicted us':>14}")
    families: dict[str, tuple[Transition, int]] = {"diagonal": (Decay(), 1), "delta": (Dense(), 0)}
    chain = Layout(comm.size, comm.size).chain
    for family, (transition, width) in families.items():
        A = torch.rand(1, 1, args.heads, args.key, width or args.key, device=device)
        B = torch.rand(1, 1, args.heads, args.key, args.value, device=device)
        choice = choose("auto", chain, links, *sizes_of(A, B))
        for exchange, start in EXCHANGES.items():
            options = choose(exchange, chain, links, *sizes_of(A, B)).options
            times = []
            for _ in range(REPEATS):
                comm.barrier()
                begin = time.perf_counter()
                start(transition, A, B, chain, comm, **options)()
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            slowest = comm.all_reduce(
                torch.tensor(statistics.median(times[2:]), device=device), "max"
            )
            chosen = "  <- auto" if exchange == choice.name else ""
            row = f"{family:<10}{exchange:<12}{1e6 * slowest.item():>12.0f}"
            say(comm, f"{row}{1e6 * choice.seconds[exchange]:>14.0f}{chosen}")
    comm.barrier()
    dist.destroy_process_group()


def sizes_of(A: torch.Tensor, B: torch.Tensor) -> tuple[int, int]:
    """Bytes of one range's A and B."""
    return A[0].numel() * A.element_size(), B[0].numel() * B.element_size()


def say(comm: Communicator, line: str) -> None:
    if comm.rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()

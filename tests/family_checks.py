"""What the interpreter tests of the families' Triton kernels share: fp32 against the fp64 loop."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from harness import assert_close, run_ranks
from torch import Tensor

import seqpar
from seqpar.kernels.family import Family
from seqpar.kernels.pieces import Pieces

# k, v, gates -> the family to be tested
Choose = Callable[[Tensor, Tensor, list[Tensor]], Family]


def in_fp32(given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, and the gates as a family takes them."""
    q, k, v, *gates = (x.detach().float() for x in given)
    return [q, k, v], [x if x.dim() == 4 else x[..., None] for x in gates]


def check_functions(
    loop: Callable[..., tuple[Tensor, Tensor]],
    choose: Choose,
    kind: str,
    given: Sequence[Tensor],
    cuts: Sequence[int],
    nats: float,
) -> None:
    """Outputs, leaving state, all gradients, for pieces with states entering and leaving.

    loop: of the reference. kind: the family's class. given: q, k, v and gates as `loop` takes them.
    """
    batch, _, heads, V = given[2].shape
    K = given[1].shape[3]
    entering = torch.randn(batch, heads, K, V).double()
    leaves = [x.requires_grad_() for x in (*given, entering)]
    o, leaving = loop(*given, scale=0.3, initial_state=entering)
    do, d_leaving = torch.randn_like(o).float(), torch.randn_like(leaving).float()
    expected = torch.autograd.grad((o * do).sum() + (leaving * d_leaving).sum(), leaves)

    count = len(cuts) - 1
    pieces = Pieces(list(pairwise(cuts)), [True] * count, [True] * count, [(0, count)])
    (q, k, v), gates = in_fp32(given)
    family = choose(k, v, gates)
    assert type(family).__name__ == kind
    # fp32 running sums of strong decays are rounded at 1e3 nats: 6e-5
    bound = 5e-5 if nats > 1 else 1e-5
    states, adjoints = (torch.empty(batch, count, heads, K, V) for _ in range(2))
    prepared = family.prepare(q, k, v, gates, 0.3, pieces)
    A, B = prepared.summarize()
    arriving = entering.detach().float()
    family.scan(A, B, pieces, arriving[None], states, backwards=False)
    found = handed_on(family, A, B, pieces, arriving, backwards=False)
    assert_close("S", found, leaving, bound)
    assert_close("o", prepared.run(lambda: states), o, bound)
    prepared = family.prepare(q, k, v, gates, 0.3, pieces)
    A, B = family.transition.adjoint(A), prepared.summarize_backward(do)
    family.scan(A, B, pieces, d_leaving[None], adjoints, backwards=True)
    found = handed_on(family, A, B, pieces, d_leaving, backwards=True)
    assert_close("dS", found, expected[-1], bound)
    gradients = prepared.run_backward(states, do, lambda: adjoints, [True] * len(gates))
    assert len(gradients) == len(given)
    for i, (x, right) in enumerate(zip(gradients, expected[:-1], strict=True)):
        assert x is not None
        assert_close(f"gradient {i}", x.reshape(right.shape), right, bound)


def handed_on(
    family: Family, A: Tensor, B: Tensor, pieces: Pieces, arriving: Tensor, *, backwards: bool
) -> Tensor:
    """What leaves the one range there is, [B, H, K, V], if `arriving` enters it."""
    [whole_A], [whole_B] = family.leave(A, B, pieces, backwards=backwards)
    return family.transition.apply(whole_A, arriving) + whole_B


def check_chain(choose: Choose, given: Sequence[Tensor]) -> None:
    """A sequence cut at random equals the uncut one, through (A, B) of each piece, both ways."""
    (q, k, v), gates = in_fp32(given)
    family = choose(k, v, gates)
    tokens, (K, V) = v.shape[1], (k.shape[3], v.shape[3])
    do, start, end = torch.randn_like(v), torch.randn(1, 1, K, V), torch.randn(1, 1, K, V)

    def run(cuts: list[int]) -> list[Tensor]:
        count = len(cuts) - 1
        pieces = Pieces(list(pairwise(cuts)), [True] * count, [True] * count, [(0, count)])
        states, adjoints = (torch.empty(1, count, 1, K, V) for _ in range(2))
        prepared = family.prepare(q, k, v, gates, 1.0, pieces)
        A, B = prepared.summarize()
        maps = (A, B), (family.transition.adjoint(A), prepared.summarize_backward(do))
        family.scan(*maps[0], pieces, start[None], states, backwards=False)
        family.scan(*maps[1], pieces, end[None], adjoints, backwards=True)
        S = handed_on(family, *maps[0], pieces, start, backwards=False)
        dS = handed_on(family, *maps[1], pieces, end, backwards=True)
        o = prepared.run(lambda: states)
        gradients = prepared.run_backward(states, do, lambda: adjoints, [True] * len(gates))
        totals = [
            family.leave(*each, pieces, backwards=backwards)[0]
            for each, backwards in zip(maps, (False, True), strict=True)
        ]
        return [S, dS, *totals, o, *(x for x in gradients if x is not None)]

    whole = run([0, tokens])
    assert_close("A and its adjoint", whole[2].mT, whole[3], 1e-5)
    cuts = sorted(torch.randperm(tokens - 1)[:6].add(1).tolist())
    for i, (x, right) in enumerate(zip(run([0, *cuts, tokens]), whole, strict=True)):
        assert_close(str(i), x, right, 1e-5)


def check_two_ranks(
    loop: Callable[..., tuple[Tensor, Tensor]],
    attend: Callable[..., Tensor],
    given: Sequence[Tensor],
    kind: str,
) -> None:
    """Packed documents on two ranks equal the token loop; given: 192 tokens; kind: a layout's."""
    documents = [0, 1, 30, 110, 120, 140, 192]
    leaves = [x.requires_grad_() for x in given]
    o, _ = loop(*leaves, cu_seqlens=documents)
    do = torch.randn_like(o)
    expected = [o.detach(), *torch.autograd.grad((o * do).sum(), leaves)]
    layout = seqpar.Layout(192, 2, kind, documents)

    def work(rank: int) -> list[Tensor]:
        sp = seqpar.SequenceParallel(layout=layout, segment_tokens=64)
        local: list[Any] = [layout.shard(x.detach(), rank).float().requires_grad_() for x in leaves]
        o = attend(*local, sp=sp)
        return [o.detach(), *torch.autograd.grad(o, local, layout.shard(do, rank).float())]

    for rank, results in enumerate(run_ranks(work, 2)):
        for i, (result, whole) in enumerate(zip(results, expected, strict=True)):
            wanted = layout.shard(whole, rank)
            assert_close(f"{i} on rank {rank}", result, wanted, 1e-5, whole=whole)

"""The loss in chunks of tokens is the loss of all logits at once, however the vocabulary is cut."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import assert_close, run_ranks
from torch import Tensor

from seqpar.models.loss import linear_cross_entropy

TOKENS, BATCH, HIDDEN, VOCABULARY = 12, 2, 8, 20


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, and a gradient for each token's loss, some of them 0."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, BATCH, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=draw)
    wanted = torch.rand(BATCH, TOKENS, generator=draw, dtype=torch.float64)
    return hidden, weight, labels, wanted * (wanted > 0.3)


def expected() -> list[Tensor]:
    """losses and the gradients of hidden and weight, by PyTorch's own operators."""
    hidden, weight, labels, wanted = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = (hidden @ weight.T).transpose(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view(BATCH, TOKENS)
    return [losses.detach(), *torch.autograd.grad((losses * wanted).sum(), [hidden, weight])]


def found(rank: int, ranks: int, chunk: int, cut: bool) -> list[Tensor]:
    hidden, weight, labels, wanted = inputs()
    x = (hidden.chunk(ranks)[rank] if cut else hidden).clone().requires_grad_()
    rows = weight.chunk(ranks)[rank].clone().requires_grad_()
    group = dist.group.WORLD if ranks > 1 else None
    losses = linear_cross_entropy(
        x, rows, labels, chunk_tokens=chunk, tp_group=group, sequence_parallel=cut
    )
    return [losses.detach(), *torch.autograd.grad((losses * wanted).sum(), [x, rows])]


@pytest.mark.parametrize("chunk", [0, 1, 5, 8, 100])
@pytest.mark.parametrize(("ranks", "cut"), [(1, False), (2, False), (2, True), (4, True)])
def test_loss_and_gradients_are_those_of_all_logits(ranks: int, cut: bool, chunk: int) -> None:
    losses, d_hidden, d_weight = expected()
    for rank, own in enumerate(run_ranks(found, ranks, ranks, chunk, cut)):
        assert_close("losses", own[0], losses, 1e-12)
        part = d_hidden.chunk(ranks)[rank] if cut else d_hidden
        assert_close("hidden", own[1], part, 1e-12)
        assert_close("weight", own[2], d_weight.chunk(ranks)[rank], 1e-12)


def test_logits_far_apart_do_not_overflow() -> None:
    hidden, weight, labels, _ = inputs()
    far = 1000 * hidden.float()
    losses = linear_cross_entropy(far, weight.float(), labels, chunk_tokens=4)
    logits = (far @ weight.float().T).transpose(0, 1)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert_close("losses", losses.flatten(), wanted, 1e-6)


def test_nothing_as_large_as_all_logits_is_made_or_kept() -> None:
    tokens, vocabulary, chunk = 64, 50, 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(tokens, 1, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).sum().backward()
    assert largest == chunk * vocabulary

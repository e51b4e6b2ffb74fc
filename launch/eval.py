"""Does a trained model use its context? `seqpar eval RUN/config.yaml`, on one GPU or CPU.

Texts are read in parts with the state carried on, so their length is bounded by nothing but the
keys and values of softmax layers.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seqpar.launch.config import Config, load_config, whole_number
from seqpar.launch.data import Corpus, open_corpus
from seqpar.launch.failure import UserError
from seqpar.launch.generate import PART, Reader, generate, load_model
from seqpar.launch.ranks import start_ranks
from seqpar.launch.terminal import command_parser, plain_messages
from seqpar.launch.tokenizer import Tokenizer, load_tokenizer

PARTS = 8
"""Of a text, each read by itself for comparison."""

FIRST = 16
"""Tokens of the first range of positions; each later one is as long as all before it."""


@dataclass(frozen=True)
class Position:
    """Losses, in nats a token, at positions [start, stop) of documents.

    loss: with all that came before in the document; alone: with nothing from before the token's
    part, of the `PARTS`.
    """

    start: int
    stop: int
    tokens: int
    loss: float
    alone: float


def by_position(
    model: torch.nn.Module, corpus: Corpus, documents: int, length: int
) -> list[Position]:
    """Losses by position in the longest `documents` of `corpus`, up to `length` tokens of each."""
    longest = np.argsort(-corpus.lengths, kind="stable")[:documents]
    sums = np.zeros((3, length.bit_length() + 1))  # count, loss, alone, by range of positions
    for document in longest:
        tokens = int(min(corpus.lengths[document], length + 1))
        if tokens < 2:
            continue
        text = torch.from_numpy(corpus.read(int(document), 0, tokens))
        part = -(-(tokens - 1) // PARTS)
        whole = _losses(model, text)
        alone = torch.cat(
            [_losses(model, text[at : at + part + 1]) for at in range(0, tokens - 1, part)]
        )
        places = np.maximum(0, np.floor(np.log2(np.arange(tokens - 1).clip(1) / FIRST)) + 1)
        for row, values in zip(sums, (torch.ones_like(whole), whole, alone), strict=True):
            np.add.at(row, places.astype(int), values.cpu().double().numpy())
    found = []
    for place, (count, loss, alone_loss) in enumerate(sums.T):
        if count:
            start = FIRST * 2 ** (place - 1) if place else 0
            stop = min(FIRST * 2**place, length)
            found.append(Position(start, stop, int(count), loss / count, alone_loss / count))
    return found


def _losses(model: torch.nn.Module, text: Tensor) -> Tensor:
    """Loss of each next token of `text` [T + 1], read from the beginning."""
    labels = text[1:].split(PART)
    return torch.cat(
        [
            F.cross_entropy(logits, label.to(logits.device), reduction="none")
            for logits, label in zip(Reader(model).read_long(text[:-1]), labels, strict=True)
        ]
    )


@dataclass(frozen=True)
class Needle:
    """How well a fact is found again that stands at `depth` (0: the beginning, 1: the end).

    found: share of the trials whose answer is right, token by token; loss: of the answer, in nats
    a token; without: the same where the fact is not in the text.
    """

    depth: float
    found: float
    loss: float
    without: float


def needle(
    model: torch.nn.Module,
    corpus: Corpus,
    tokenizer: Tokenizer,
    length: int,
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> list[Needle]:
    """Hide a number in `length` tokens of running text of `corpus`, and ask for it at their end."""
    draw = np.random.default_rng(seed)
    rows = []
    for depth in depths:
        right, with_it, without_it = 0, 0.0, 0.0
        for _ in range(trials):
            number = f"{draw.integers(10_000, 100_000)}"
            fact = tokenizer.encode(f" The secret number is {number}. ")
            asked = tokenizer.encode(" The secret number is ")
            answer = tokenizer.encode(number)
            room = length - len(fact) - len(asked) - len(answer)
            if room < 1:
                shortest = length - room + 1
                raise ValueError(f"--length={length} must be at least {shortest} for a needle")
            hay = _hay(corpus, tokenizer, room + len(fact), draw)
            at = round(depth * room)
            texts = ([hay[:at], fact, hay[at:room], asked, answer], [hay, asked, answer])
            hidden, bare = (_answer(model, np.concatenate(text), len(answer)) for text in texts)
            right += hidden[0]
            with_it, without_it = with_it + hidden[1], without_it + bare[1]
        rows.append(Needle(depth, right / trials, with_it / trials, without_it / trials))
    return rows


def _hay(
    corpus: Corpus, tokenizer: Tokenizer, length: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    """`length` tokens of documents in a random order, laid end to end as one."""
    parts: list[NDArray[np.int64]] = []
    missing = length
    while missing > 0:
        document = int(draw.integers(len(corpus.lengths)))
        tokens = corpus.read(document, 0, int(min(corpus.lengths[document], missing + 1)))
        parts.append(tokens[tokens != tokenizer.end_of_document][:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts)


def _answer(model: torch.nn.Module, text: NDArray[np.int64], answer: int) -> tuple[bool, float]:
    """Whether the last tokens of `text` are the likeliest ones, and their mean loss."""
    tokens = torch.from_numpy(text)
    both = torch.cat(list(deque(Reader(model).read_long(tokens[:-1]), maxlen=2)))
    logits, wanted = both[-answer:], tokens[-answer:].to(both.device)
    right = bool((logits.argmax(-1) == wanted).all())
    return right, float(F.cross_entropy(logits, wanted))


EXAMPLES = """examples:
  seqpar eval runs/demo/config.yaml                          held-out loss by position
  seqpar eval runs/demo/config.yaml --needle --length 64K --depths 0,0.25,0.5,0.75,1
  seqpar eval runs/demo/config.yaml --prompt 'def main(' --tokens 200
  seqpar eval runs/demo/config.yaml --step 40 data.held_out=runs/data/other
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser(
        "seqpar eval", "See whether a trained model uses its context, and let it write.", EXAMPLES
    )
    parser.add_argument("config", metavar="CONFIG", help="the config.yaml that the run wrote")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--step", default="latest", help="of the checkpoint; default: the newest")
    parser.add_argument("--length", help="tokens of each text; default: data.sequence_length")
    parser.add_argument("--documents", default="16", help="how many, by position")
    parser.add_argument("--needle", action="store_true", help="hide a number, and ask for it")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="where it is hidden")
    parser.add_argument("--trials", default="4", help="numbers hidden at each depth")
    parser.add_argument("--prompt", help="write on from this text")
    parser.add_argument("--tokens", default="100", help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--tokenizer", help="of a corpus that does not name it")
    args = parser.parse_intermixed_args(argv)
    plain_messages()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("error: eval runs on one GPU or CPU; start it without torchrun")
    try:
        config = load_config(args.config, args.overrides)
        _evaluate(config, args)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")


def _evaluate(config: Config, args: argparse.Namespace) -> None:
    field = "path" if config.data.held_out is None else "held_out"
    corpus = open_corpus(config, field)
    length = whole_number("--length", args.length or str(config.data.sequence_length))
    documents = whole_number("--documents", args.documents)
    trials, tokens = whole_number("--trials", args.trials), whole_number("--tokens", args.tokens)
    try:
        depths = [float(depth) for depth in args.depths.split(",")]
    except ValueError:
        depths = [-1]
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"--depths={args.depths} must be numbers from 0 to 1, such as 0,0.5,1")
    if not args.temperature >= 0:
        raise ValueError(f"--temperature={args.temperature} must be at least 0; nearest: 0")
    if args.step != "latest" and not args.step.isdecimal():
        raise ValueError(f'--step={args.step} must be "latest" or the step of a checkpoint')
    start_ranks()
    model, path = load_model(config, args.step)
    print(f"checkpoint {path}; {corpus.name}")
    if args.prompt is not None:
        tokenizer = _tokenizer(corpus, args.tokenizer)
        prompt = torch.from_numpy(tokenizer.encode(args.prompt))
        if not len(prompt):
            raise ValueError("--prompt is empty; give at least one character")
        written = generate(
            model,
            prompt,
            stop=tokenizer.end_of_document,
            temperature=args.temperature,
            seed=config.train.seed,
        )
        print(args.prompt + tokenizer.decode(np.array(list(islice(written, tokens)))))
    if args.needle:
        tokenizer = _tokenizer(corpus, args.tokenizer)
        rows = needle(model, corpus, tokenizer, length, depths, trials, config.train.seed)
        print(f"a number hidden in {length:,} tokens, {trials} times at each depth")
        print("   depth    found  loss of the answer  without the number")
        for row in rows:
            print(f"{row.depth:8.0%} {row.found:8.0%} {row.loss:19.4f} {row.without:19.4f}")
    if args.prompt is None and not args.needle:
        print(f"loss in nats a token by position, up to {length:,} tokens of a document")
        print("      positions     tokens  with all before  with its part alone")
        for place in by_position(model, corpus, documents, length):
            print(
                f"{place.start:>7,} {place.stop - 1:>7,} {place.tokens:>10,} {place.loss:16.4f} "
                f"{place.alone:20.4f}"
            )


def _tokenizer(corpus: Corpus, name: str | None) -> Tokenizer:
    name = name or (corpus.metadata.tokenizer if corpus.metadata else None)
    if name is None:
        raise ValueError(f"{corpus.name} does not name its tokenizer; give --tokenizer")
    return load_tokenizer(name)


if __name__ == "__main__":
    main()

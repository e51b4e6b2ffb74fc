"""Text to Megatron's indexed format: `seqpar prepare INPUT... --output PREFIX`.

Writes PREFIX.bin (token ids), PREFIX.idx (where documents begin) and PREFIX.json (tokenizer,
counts, unigram entropy); with --held-out also PREFIX.held_out.{bin,idx,json}. Every document ends
with the tokenizer's end-of-document id.
"""

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqpar.launch.terminal import command_parser, plain_messages
from seqpar.launch.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

SUFFIXES = (".bin", ".json", ".idx")  # .idx last: its presence says that the corpus is complete
MAX_DOCUMENT = 2**31 - 1  # the format counts the tokens of a document in 32 bits


@dataclass
class Metadata:
    """What is known of a prepared corpus, stored beside it. unigram_entropy: nats a token."""

    tokenizer: str
    vocab_size: int
    end_of_document: int
    documents: int
    tokens: int
    unigram_entropy: float


class CorpusWriter:
    """Writes documents into `prefix`.bin, .idx and .json, and counts their tokens."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._prefix, self._tokenizer = prefix, tokenizer
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.documents = 0

    def add(self, tokens: NDArray[np.int64]) -> None:
        self._builder.add_document(tokens, [len(tokens)])
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self.documents += 1

    def finish(self) -> Metadata:
        self._builder.finalize(f"{self._prefix}.idx")
        metadata = Metadata(
            tokenizer=self._tokenizer.name,
            vocab_size=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            documents=self.documents,
            tokens=int(self._counts.sum()),
            unigram_entropy=entropy(self._counts),
        )
        Path(f"{self._prefix}.json").write_text(json.dumps(asdict(metadata), indent=1) + "\n")
        return metadata


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that `counts` are of."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def prepare(
    inputs: Sequence[Path],
    output: str,
    *,
    tokenizer: str = "byte",
    glob: str = "*",
    held_out: float = 0.0,
) -> list[Metadata]:
    """Write the documents of `inputs` as corpus `output`, and part of them as `output`.held_out.

    A document is a file, or a line of a file that ends in .jsonl (its field "text"). Empty
    documents and those that are not UTF-8 are left out, each named in a warning.

    Args:
        inputs: files, or folders whose files matching `glob` are taken recursively, in order of
            their path.
        output: the prefix of the files written. Folders are made as needed.
        tokenizer: "byte" or the path of a Hugging Face tokenizer.json.
        held_out: fraction of the documents that go to `output`.held_out. Which ones depends on
            their text alone, so copies of one document are all on one side.

    Returns: the metadata of `output`, and of `output`.held_out if asked for.

    Raises:
        ValueError: an input that cannot be read, no document at all, or an output that exists.
            Nothing is left at `output` then.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held-out={held_out} must be at least 0 and below 1")
    names = [output, f"{output}.held_out"] if held_out else [output]
    for path in (Path(name + suffix) for name in names for suffix in SUFFIXES):
        if path.exists():
            raise ValueError(f"output={output}: {path} exists; choose another prefix or remove it")
    encoder = load_tokenizer(tokenizer)
    files = list(_files(inputs, glob))
    folder = Path(output).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".prepare-")
    except OSError as error:
        raise ValueError(f"output={output}: cannot write to {folder} ({error.strerror})") from None
    with temporary:
        parts = [Path(temporary.name) / str(i) for i in range(len(names))]
        writers = [CorpusWriter(part, encoder) for part in parts]
        for name, text in _documents(files):
            tokens = np.append(encoder.encode(text), encoder.end_of_document)
            if len(tokens) > MAX_DOCUMENT:
                raise ValueError(
                    f"{name}: {len(tokens)} tokens in one document, the format holds at most "
                    f"{MAX_DOCUMENT}; split it"
                )
            writers[_is_held_out(text, held_out)].add(tokens)
        for writer, what in zip(writers, ("", "held-out "), strict=False):
            if not writer.documents:
                total = sum(other.documents for other in writers)
                raise ValueError(
                    f"empty corpus: none of {total} documents is in the {what}part; "
                    + ("change --held-out or give more documents" if total else "give other inputs")
                )
        found = [writer.finish() for writer in writers]
        # the corpus itself last: where it is, the held-out part is
        for part, name in reversed(list(zip(parts, names, strict=True))):
            for suffix in SUFFIXES:
                part.with_suffix(suffix).rename(name + suffix)
    return found


def _is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _files(inputs: Sequence[Path], glob: str) -> Iterator[Path]:
    for path in inputs:
        if path.is_dir():
            found = sorted(file for file in path.rglob(glob) if file.is_file())
            if not found:
                raise ValueError(f"input {path}: no file in this folder matches --glob {glob!r}")
            yield from found
        elif path.exists():
            yield path
        else:
            raise ValueError(f"input {path}: no such file or folder")


def _documents(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that is not empty."""
    for name, content, is_json in _contents(files):
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            logger.warning("left out %s: not UTF-8 text (byte %d)", name, error.start)
            continue
        document = _field(name, text) if is_json else text
        if document:
            yield name, document
        else:
            logger.warning("left out %s: empty", name)


def _contents(files: Iterable[Path]) -> Iterator[tuple[str, bytes, bool]]:
    """(name, content, whether that is JSON) of each file, or of each line that is."""
    for path in files:
        try:
            with path.open("rb") as file:
                if path.suffix != ".jsonl":
                    yield str(path), file.read(), False
                    continue
                # lines of bytes: JSON strings may hold other line separators of Unicode as they are
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", line, True
        except OSError as error:
            raise ValueError(f"input {path}: cannot be read ({error.strerror})") from None


def _field(name: str, line: str) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"input {name}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError(f'input {name}: must be an object whose field "text" is a string')
    return str(document["text"])


EXAMPLES = """examples:
  seqpar prepare my_texts/ --glob '*.md' --output runs/data/mine --held-out 0.02
  seqpar prepare a.jsonl b.jsonl --output runs/data/web --tokenizer path/to/tokenizer.json
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser(
        "seqpar prepare", "Turn texts into a corpus in Megatron's indexed format.", EXAMPLES
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help='a text file, a .jsonl file (its field "text"), or a folder of them',
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the files to write")
    parser.add_argument(
        "--tokenizer", default="byte", metavar="NAME", help='"byte" or path of a tokenizer.json'
    )
    parser.add_argument("--glob", default="*", help="which files of a folder, e.g. '*.py'")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="of the documents, put into a corpus of their own, PREFIX.held_out",
    )
    args = parser.parse_args(argv)
    plain_messages()
    try:
        found = prepare(
            args.inputs,
            args.output,
            tokenizer=args.tokenizer,
            glob=args.glob,
            held_out=args.held_out,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, metadata in zip((args.output, f"{args.output}.held_out"), found, strict=False):
        print(
            f"{name}: {metadata.documents:,} documents, {metadata.tokens:,} tokens "
            f"(tokenizer {metadata.tokenizer}, vocabulary {metadata.vocab_size:,}), "
            f"unigram entropy {metadata.unigram_entropy:.4f} nats"
        )


if __name__ == "__main__":
    main()

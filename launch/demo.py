"""The demonstration: `python -m seqpar.launch.demo` trains a small hybrid on two CPU ranks.

Its text is the Python standard library's own source, byte by byte. Extra words change settings, as
in `python -m seqpar.launch.demo train.steps=20`.
"""

import os
import sys
import sysconfig
from itertools import count
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from seqpar.launch.config import load_config
from seqpar.launch.prepare import prepare
from seqpar.launch.terminal import plain_messages

RANKS = 2
HELD_OUT = 0.05
# not the library's own, its tests, and tables of characters that are no running text
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


def library_files() -> list[Path]:
    """The source files of the Python standard library, in order of their path."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if not _LEFT_OUT & set(path.relative_to(library).parts) and path.stat().st_size
    ]


def main() -> None:
    """The command line."""
    plain_messages()
    path = Path(__file__).with_name("configs") / "demo.yaml"
    try:
        config = load_config(str(path), sys.argv[1:])
        if not Path(f"{config.data.path}.idx").exists():
            corpus, held_out = prepare(library_files(), config.data.path, held_out=HELD_OUT)
            print(f"prepared {config.data.path}: {corpus.tokens + held_out.tokens:,} tokens")
    except ValueError as error:
        sys.exit(f"error: {error}")
    words = sys.argv[1:]
    if not any(word.startswith(("log.folder=", "checkpoint.resume=")) for word in words):
        words.append(f"log.folder={_unused(config.log.folder)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a rank a core
    torchrun = ["--standalone", "--nproc-per-node", str(RANKS), "-m", "seqpar.launch.train"]
    try:
        run(parse_args([*torchrun, os.path.relpath(path), *words]))
    except ChildFailedError:
        sys.exit(1)  # the ranks have said why


def _unused(folder: str) -> str:
    """`folder`, or the first of folder-2, folder-3, ... that is not there yet."""
    names = (folder if i == 1 else f"{folder}-{i}" for i in count(1))
    return next(name for name in names if not Path(name).exists())


if __name__ == "__main__":
    main()

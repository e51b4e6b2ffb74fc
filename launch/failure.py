"""User errors of many ranks: one message, no traceback, every rank leaves."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from seqpar.comm import Communicator

logger = logging.getLogger(__name__)

T = TypeVar("T")


SAVED = 75
"""Exit code of a run that was asked to stop, and has saved: start it again (EX_TEMPFAIL)."""

EXIT_CODE_FILE = "SEQPAR_EXIT_CODE_FILE"
"""Names a file for the exit code that all ranks agree on. torchrun takes any but 0 for a crash that
may pass: it would start the ranks again, and tells its caller only that something failed."""


class UserError(Exception):
    """A mistake of the user that all ranks know of. Its text is the message to show."""

    code = 1


class LoneError(Exception):
    """What one rank has met while the others go on. Its text is the message to show."""


class Stopped(UserError):
    """The run was asked to stop, and has saved."""

    code = SAVED


def together(comm: Communicator, work: Callable[[], T]) -> T:
    """The result of `work()`; raise `UserError` on every rank of `comm` if any rank's work failed.

    ValueError and OSError are the user's: a setting or a file. The lowest rank's message counts.
    Every rank must call this, `work` itself may hold collectives only if no rank can fail before
    them alone. Anything else a rank raises passes through and is that rank's own.
    """
    message, result = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message = str(error) or repr(error)
        logger.debug("where the user error was found", exc_info=True)
    failed = torch.tensor([message is not None], dtype=torch.int32)
    if comm.all_reduce(failed, "max").item():
        raise UserError(next(text for text in comm.all_gather_object(message) if text is not None))
    return result  # type: ignore[return-value]


def agree(comm: Communicator, settings: dict[str, Any]) -> None:
    """Raise `UserError` on every rank unless all have the same `settings`, by name.

    Nodes are started one by one: ranks with other settings would wait for each other.
    """
    everywhere = comm.all_gather_object(settings)
    for rank, other in enumerate(everywhere):
        for name, value in other.items():
            if value != everywhere[0].get(name):
                raise UserError(
                    f"{name} is {everywhere[0].get(name)!r} on rank 0 and {value!r} on rank {rank};"
                    " start all nodes with the same settings and data"
                )


def leave(message: str, rank: int, code: int | None = None) -> NoReturn:
    """End this process; rank 0 says why.

    torchrun ends with a report of its own, whose last lines quote what its workers left in the file
    named by TORCHELASTIC_ERROR_FILE: the message goes there too, so that it is not buried.

    Args:
        code: what all ranks leave with; None: this rank leaves on its own, with 1.
    """
    if rank == 0:
        print(f"error: {message}" if code != SAVED else message, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    if code is not None and (path := os.environ.get(EXIT_CODE_FILE)):
        with open(path, "w") as file:
            file.write(f"{code}\n")
        sys.exit(0)
    sys.exit(1 if code is None else code)

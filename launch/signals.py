"""Stopping from outside: SIGTERM and SIGUSR1 ask a run to save and to leave."""

import signal
from types import FrameType

import torch

from seqpar.comm import Communicator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Notes the signals of `SIGNALS` from now on, in place of what they would do."""

    def __init__(self) -> None:
        self._received: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def asked(self, control: Communicator) -> bool:
        """Whether any rank of `control` has been asked to stop. All of them call it together."""
        own = torch.tensor([self._received is not None], dtype=torch.int32)
        return bool(control.all_reduce(own, "max").item())

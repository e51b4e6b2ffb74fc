"""The (gated) delta rule on GPUs (walks.py has what it shares with DPLR)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from seqpar.kernels import frames
from seqpar.kernels.family import Prepared
from seqpar.kernels.launch import plan
from seqpar.kernels.passes import Passes, is_for_hopper, operand_dtype
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.strides import dense
from seqpar.kernels.tuned import BLOCK, HOPPER_WIDTHS, run_config
from seqpar.kernels.walks import PART, WalkFamily, prepared


@dataclass(frozen=True)
class TritonDelta(WalkFamily):
    """Implements `seqpar.kernels.family.Family`: gates beta and, if decayed, log_decay."""

    decayed: bool

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
    ) -> Prepared:
        given = q, k
        q, k, v = dense(q), dense(k), dense(v)
        beta, gate = gates[0], dense(gates[1]) if self.decayed else k
        decay = "none"
        if self.decayed:
            decay = "scalar" if gate.shape[3] == 1 else "diagonal"
        calls = plan(pieces, "delta", decay, scale, q, k, v, beta, gate)
        found, chunk, plus, operand = None, 64, k, operand_dtype(q.dtype)
        framed = decay == "diagonal"
        fits = k.shape[3] in HOPPER_WIDTHS and (decay != "scalar" or scale > 0)
        fits = fits and (framed or is_for_hopper(q, k))
        hopper = calls.once("hopper", lambda: fits and is_for_hopper(v))
        if framed:
            chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
            part = chunk if hopper else PART
            found = frames.enter(q, k, gate, pieces, BLOCK[decay], chunk, operand, calls, part)
            q, k, plus = found.q, found.k, found.plus
        passes = Passes(decay, pieces, calls, hopper, chunk, gate, found)
        return prepared(passes, scale, operand, given, q, plus, k, v, beta)

"""The passes of the run kernels over the tokens, launched, for every family made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from seqpar.kernels import tables
from seqpar.kernels.decay_kernels import run_kernel
from seqpar.kernels.frames import Frames
from seqpar.kernels.launch import Launch
from seqpar.kernels.once import Once
from seqpar.kernels.pieces import Pieces
from seqpar.kernels.state_kernels import gate_kernel
from seqpar.kernels.strides import named
from seqpar.kernels.tuned import BLOCK, ceil_div, is_hopper, padded, run_config


@dataclass(frozen=True)
class Pass:
    """Arguments of a run kernel (see decay_kernels.py); what a pass does not use repeats another.

    x, y, z, other [B, T, H, D] at their own numbers of heads; gate [B, T, heads, 1]; out [B, T,
    heads, DZ]; entering [B, slots, heads, K, V]. decay: "none", "scalar", "key" or "value".
    transposed: DZ is K and DY is V. gated: whether the gradient of the decays is wanted; block: its
    tokens; blocks: how many there are. strict: whether a token is left out of its own sum. split:
    whether the state is taken in two parts, and by the general kernel the scores, and what `exact`
    says. exact: whether what is multiplied with scalar decay is. frames: of diagonal decay; chunks:
    how many they were cut from.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    other: Tensor
    gate: Tensor
    entering: Tensor
    saved: Tensor
    out: Tensor
    table: Tensor
    block: int
    blocks: int
    scale: float
    decay: str
    reverse: bool
    transposed: bool
    gated: bool
    strict: bool
    split: bool
    exact: bool
    frames: Frames | None
    chunks: int

    @property
    def values(self) -> dict[str, Any]:
        """Numbers and constants of both kernels, by name."""
        (batch, tokens, heads, DZ), DY = self.out.shape, self.y.shape[-1]
        read = {"x": self.x, "y": self.y, "z": self.z, "w": self.other}
        # of a state's rows (channels of y) and columns (channels of z)
        state_row, state_col = (1, DY) if self.transposed else (DZ, 1)
        return {
            "scale": self.scale,
            "batches": batch,
            "tokens": tokens,
            "blocks": self.blocks,
            "slots": self.entering.shape[1],
            "saves": self.saved.shape[1],
            "chunks": self.chunks,
            **named(**read, g=self.gate),
            "state_row": state_row,
            "state_col": state_col,
            "HEADS": heads,
            # how many heads of v share a head of each tensor
            **{f"{name.upper()}_GROUP": heads // x.shape[2] for name, x in read.items()},
            "DY": DY,
            "DZ": DZ,
            "DECAY": self.decay,
            "REVERSE": self.reverse,
            "GATE": self.gated,
            "STRICT": self.strict,
            "SPLIT": self.split,
            "EXACT": self.exact,
            "SPAN": self.block,
        }


@dataclass(frozen=True)
class Traces:
    """What the passes of dq and dk leave for the gradient of the decays (see the kernels)."""

    shares: dict[str, Tensor]  # of scalar decay, [B, H, lines, T]
    flows: Tensor  # [B, H, lines, blocks], or of diagonal decay [B, blocks, H, K]
    saved: Tensor  # states at the ends of blocks, [B, saves, H, K, V]


def traced(traces: Traces | None, name: str, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """saved, shares of one pass, and flows; `spare` for what is not wanted."""
    if traces is None:
        return spare, spare, spare
    return traces.saved, traces.shares.get(name, spare), traces.flows


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes of one direction, over the same tokens.

    decay: "none", "scalar" or "diagonal". calls: what calls alike share. hopper: whether Hopper's
    own kernel runs them. gate [B, T, HV, 1] of scalar decay, any tensor otherwise. frames: of
    diagonal decay, that q and k are relative to. chunk: tokens of the longest.
    """

    decay: str
    pieces: Pieces
    calls: Once
    hopper: bool
    chunk: int
    gate: Tensor
    frames: Frames | None

    @property
    def block(self) -> int:
        """Tokens between the states that the gradient of the decays needs."""
        return BLOCK[self.decay]

    @property
    def table(self) -> Tensor:
        """`tables.piece_rows`."""
        return self.calls.once(
            "pieces", lambda: tables.piece_rows(self.pieces, self.block, self.chunk, self.gate)
        )

    @property
    def blocks(self) -> Tensor:
        """`tables.cut_rows` of the gradient of the decays."""
        return self.calls.once(
            "blocks", lambda: tables.cut_rows(self.pieces, self.block, self.chunk, self.gate)
        )

    @property
    def chunks(self) -> int:
        """How many there are, if there are frames."""
        return 0 if self.frames is None else self.frames.levels.shape[1]

    @property
    def framed(self) -> tuple[Tensor, Tensor, Tensor]:
        """halves, steps and counts of the frames; any tensors where there are none."""
        if self.frames is None:
            return self.table, self.table, self.table
        return self.frames.halves, self.frames.steps, self.frames.counts

    def traces(self, k: Tensor, v: Tensor, key_lines: int | None = None) -> Traces:
        """Room for them, for k [B, T, H, K] and v [B, T, HV, V].

        key_lines: of "dk", and that there is a pass "d_plus", as the delta rule has it.
        """
        batch, tokens, heads, V = v.shape
        K = k.shape[-1]

        def empty(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=torch.float32, device=v.device)

        saved = empty(tables.saves(self.pieces, self.block), heads, K, V)
        if self.decay == "diagonal":
            return Traces({}, empty(len(self.blocks), heads, K), saved)
        columns = run_config(V, K, k.dtype).columns
        lines = K // 16 if self.hopper else ceil_div(K, columns)
        counts = {"dq": lines, "dk": key_lines or lines}
        if key_lines is not None:
            counts["d_plus"] = lines
        shares = {name: empty(heads, count, tokens) for name, count in counts.items()}
        return Traces(shares, empty(heads, counts["dk"], len(self.blocks)), saved)

    def d_gate(self, traces: Traces) -> Tensor:
        """The gradient of scalar decays, [B, T, H, 1]."""
        shares, flows = traces.shares, traces.flows
        batch, heads, lines, tokens = shares["dq"].shape
        d_gate = flows.new_empty(batch, tokens, heads, 1)

        def make() -> Launch:
            return Launch(
                gate_kernel,
                len(self.blocks) * heads * batch,
                tokens=tokens,
                blocks=len(self.blocks),
                HEADS=heads,
                LINES=lines,
                KEY_LINES=flows.shape[2],
                PLUS="d_plus" in shares,
                SIZE=self.block,
            )

        tensors = shares["dq"], shares.get("d_plus", flows), shares["dk"], flows, d_gate
        self.calls.once("d_gate", make)(*tensors, self.blocks)
        return d_gate

    def run(
        self,
        name: str,
        operands: tuple[Tensor, Tensor, Tensor],
        states: Tensor,
        scale: float,
        dtype: torch.dtype,
        *,
        reverse: bool = False,
        transposed: bool = False,
        strict: bool = False,
        split: bool = False,
        exact: bool = False,
        other: Tensor | None = None,
        traces: Traces | None = None,
    ) -> Tensor:
        """One pass (see decay_kernels.py): its output [B, T, HV, DZ], for x, y and z.

        name: says all of what follows it but the tensors, to calls alike. states: those that enter
        pieces, or of reverse passes the gradients of those that leave.
        """
        x, y, z = operands
        if other is None or self.frames is not None:
            other = z
        out = torch.empty(*x.shape[:2], states.shape[2], z.shape[-1], dtype=dtype, device=z.device)
        saved, shares, flows = traced(traces, name, states)

        def make() -> Callable[..., None]:
            p = Pass(
                x,
                y,
                z,
                other,
                self.gate,
                states,
                saved,
                out,
                self.table,
                self.block,
                len(self.blocks),
                scale,
                {"diagonal": "value" if transposed else "key"}.get(self.decay, self.decay),
                reverse=reverse,
                transposed=transposed,
                gated=traces is not None,
                strict=strict,
                split=split,
                exact=exact,
                frames=self.frames,
                chunks=self.chunks,
            )
            if not self.hopper:
                return _general_launch(p)
            from seqpar.kernels.hopper import hopper_launch

            return hopper_launch(p)

        run = self.calls.once((name, traces is None, states.shape[1]), make)
        run(x, y, z, other, out, self.gate, states, saved, shares, flows, *self.framed, self.table)
        return out


def _general_launch(p: Pass) -> Launch:
    batch, _, heads, DZ = p.out.shape
    DY = p.y.shape[-1]
    config = run_config(DY, DZ, p.x.dtype)
    operand, precision = products(p.x.dtype)
    return Launch(
        run_kernel,
        ceil_div(DZ, config.columns) * heads * batch * len(p.table),
        **p.values,
        BY=padded(DY),
        BZ=config.columns,
        C=p.frames.chunk if p.frames else config.chunk,
        OPERAND=operand,
        PRECISION=precision,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def is_for_hopper(*operands: Tensor) -> bool:
    """Whether Hopper's own run kernel takes passes over these."""
    if not is_hopper(operands[0].device):
        return False
    from seqpar.kernels.hopper import fits

    return fits(*operands)


def ungroup(dx: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from those of its copies in each head of v."""
    if dx.shape[2] == x.shape[2]:
        return dx
    return dx.unflatten(2, (x.shape[2], -1)).sum(3)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """`products`' first as PyTorch has it, for what is kept in memory to be an operand."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def products(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What products are formed in. fp16 could hold neither the state nor a frame's factors.

    fp32 is taken as the sum of three bf16 numbers: three TF32 products are as exact themselves, but
    tensor cores truncate sums, and add up twice as many terms at once in bf16.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "bf16x6" if isinstance(run_kernel, JITFunction) else "ieee"

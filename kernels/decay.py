"""Linear attention with no, scalar or diagonal decay on GPUs: the Triton kernels, launched.

Forward: fold the pieces that hand a state on, scan, run. Backward: the same with gradients; dq goes
forward through the tokens again, dk and dv backwards, and nothing is kept from the forward pass but
the states that entered the pieces. Diagonal decay is first taken out of q and k (frames.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from seqpar.kernels import frames, tables
from seqpar.kernels.decay_kernels import run_kernel
from seqpar.kernels.frames import Frames
from seqpar.kernels.launch import Launch, plan
from seqpar.kernels.once import Once
from seqpar.kernels.passes import Pass
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.state_kernels import fold_kernel, gate_kernel, scan_kernel
from seqpar.kernels.transition import Decay, Identity, Transition
from seqpar.kernels.tuned import (
    BLOCK,
    ceil_div,
    fold_config,
    is_hopper,
    padded,
    piece_tokens,
    run_config,
)


@dataclass(frozen=True)
class TritonLinear:
    """Implements `seqpar.kernels.family.Family`. decay: "none", "scalar" or "diagonal"."""

    decay: str

    @property
    def transition(self) -> Transition:
        return Identity() if self.decay == "none" else Decay()

    def piece_tokens(self, k: Tensor, v: Tensor) -> int:
        heads = v.shape[0] * v.shape[2]
        if _is_for_hopper(1.0, k, v):  # a processor holds one program, two of small ones
            held = 1 if max(k.shape[3], v.shape[3]) > 64 else 2
            return piece_tokens(v.shape[1], ceil_div(heads, held), v.device)
        columns = run_config(k.shape[3], v.shape[3], v.dtype).columns
        held = 4
        programs = heads * ceil_div(v.shape[3], columns)
        return piece_tokens(v.shape[1], ceil_div(programs, held), v.device)

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
    ) -> "_Prepared":
        given = q, k
        q, k, v = _dense(q), _dense(k), _dense(v)
        gate = _dense(gates[0]) if gates else k
        calls = plan(pieces, self.decay, scale, q, k, v, gate)
        block = BLOCK[self.decay]
        if self.decay != "diagonal":
            hopper = calls.once("hopper", lambda: _is_for_hopper(scale, q, k, v))
            found, chunk = None, 64
        else:
            fits = k.shape[3] in (64, 128)
            hopper = calls.once("hopper", lambda: fits and _is_for_hopper(scale, v))
            chunk = 64 if hopper else run_config(k.shape[3], v.shape[3], v.dtype).chunk
            operand = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
            found = frames.enter(q, k, gate, pieces, block, chunk, operand, calls)
            q, k = found.q, found.k
        table = calls.once("pieces", lambda: tables.piece_rows(pieces, block, chunk, v))
        blocks = calls.once("blocks", lambda: tables.cut_rows(pieces, block, chunk, v))
        made = q, k, v, gate, found, table, blocks
        return _Prepared(self.decay, scale, pieces, calls, hopper, chunk, given, *made)

    def scan(
        self,
        A: Tensor,
        B: Tensor,
        pieces: Pieces,
        arriving: Tensor,
        states: Tensor | None,
        *,
        backwards: bool,
    ) -> Tensor:
        leaving = torch.zeros_like(arriving)
        table = tables.run_rows(pieces, backwards, B)
        if not len(table):
            return leaving
        filled = B if states is None else states
        calls = plan(pieces, self.decay, states is None, backwards, B, arriving, filled)

        def make() -> Launch:
            batch, summaries, heads, DY, DZ = B.shape
            rows = 8
            return Launch(
                scan_kernel,
                len(table) * batch * heads * ceil_div(DY, rows),
                [batch, summaries, filled.shape[1], arriving.shape[1]],
                HEADS=heads,
                DY=DY,
                DZ=DZ,
                BY=rows,
                PADDED=padded(DZ),
                DECAY="key" if self.decay == "diagonal" else self.decay,
                STEP=-1 if backwards else 1,
                STORE=states is not None,
            )

        calls.once("scan", make)(A, B, arriving, filled, leaving, table)
        return leaving


@dataclass(frozen=True)
class _Gate:
    """What the passes of dq and dk leave for the gradient of the decays (see the kernels)."""

    shares: dict[str, Tensor]  # of scalar decay, [B, H, lines, T]
    flows: Tensor  # [B, H, lines, blocks], or of diagonal decay [B, blocks, H, K]
    saved: Tensor  # states at the ends of blocks, [B, saves, H, K, V]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Implements `seqpar.kernels.family.Prepared`.

    calls: what calls alike share. chunk: tokens of the longest frame. given: the q and k of the
    call; with diagonal decay q and k are those of `frames`, at v's heads. table, blocks: rows for
    pieces, and blocks of the gradient of the decays (tables.py).
    """

    decay: str
    scale: float
    pieces: Pieces
    calls: Once
    hopper: bool
    chunk: int
    given: tuple[Tensor, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    frames: Frames | None
    table: Tensor
    blocks: Tensor

    def summarize(self) -> tuple[Tensor, Tensor]:
        return self._fold(self.k, self.v, 1.0, reverse=False)

    def run(self, entering: Late) -> Tensor:
        return self._run("o", (self.q, self.k, self.v), entering())

    def summarize_backward(self, do: Tensor) -> tuple[Tensor, Tensor]:
        return self._fold(self.q, do, self.scale, reverse=True)

    def run_backward(
        self, entering: Tensor, do: Tensor, leaving: Late, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        q, k, v = self.q, self.k, self.v
        gate = self._gate() if self.frames is not None or any(wanted) else None
        dq = self._run("dq", (do, v, k), entering, q, gate)
        adjoints = leaving()
        dk = self._run("dk", (v, do, q), adjoints, k, gate)
        dv = self._run("dv", (k, q, do), adjoints)
        found: list[Tensor | None] = []
        if self.frames is not None and gate is not None:
            rest = self.gate, gate.flows, self.blocks, self.given[0].dtype, self.calls
            dq, dk, d_gate = frames.leave(self.frames, dq, dk, *rest)
            found = [d_gate.to(self.gate.dtype)]
        elif gate is not None:
            found = [self._d_gate(gate).to(self.gate.dtype)]
        elif self.decay != "none":
            found = [None]
        return [*map(_ungroup, (dq, dk), self.given), dv, *found]

    def _gate(self) -> _Gate:
        batch, tokens, heads, V = self.v.shape
        K = self.k.shape[-1]

        def empty(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=torch.float32, device=self.v.device)

        saved = empty(tables.saves(self.pieces, BLOCK[self.decay]), heads, K, V)
        if self.decay == "diagonal":
            return _Gate({}, empty(len(self.blocks), heads, K), saved)
        columns = run_config(V, K, self.k.dtype).columns
        lines = K // 16 if self.hopper else ceil_div(K, columns)
        shares = {name: empty(heads, lines, tokens) for name in ("dq", "dk")}
        return _Gate(shares, empty(heads, lines, len(self.blocks)), saved)

    def _d_gate(self, gate: _Gate) -> Tensor:
        """The gradient of scalar decays, [B, T, H, 1]."""
        batch, tokens, heads, _ = self.v.shape
        d_gate = torch.empty(batch, tokens, heads, 1, dtype=torch.float32, device=self.v.device)

        def make() -> Launch:
            return Launch(
                gate_kernel,
                len(self.blocks) * heads * batch,
                [tokens, len(self.blocks)],
                HEADS=heads,
                LINES=gate.flows.shape[2],
                SIZE=BLOCK[self.decay],
            )

        tensors = gate.shares["dq"], gate.shares["dk"], gate.flows, d_gate, self.blocks
        self.calls.once("d_gate", make)(*tensors)
        return d_gate

    def _fold(self, y: Tensor, z: Tensor, scale: float, *, reverse: bool) -> tuple[Tensor, Tensor]:
        batch, _, heads, DZ = z.shape
        DY = y.shape[-1]
        table = self.calls.once(
            ("summaries", reverse), lambda: tables.summary_rows(self.pieces, reverse, self.chunk, z)
        )
        width = {"none": 0, "scalar": 1, "diagonal": DY}[self.decay]
        summaries = len(table)
        A = z.new_empty(batch, summaries, heads, width, int(width > 0), dtype=torch.float32)
        B = z.new_empty(batch, summaries, heads, DY, DZ, dtype=torch.float32)
        if not summaries:
            return A, B

        decay = "key" if self.decay == "diagonal" else self.decay

        def make() -> Callable[..., None]:
            pieces, chunks = len(self.table), self.frames.levels.shape[1] if self.frames else 0
            if self.hopper:
                from seqpar.kernels.hopper import hopper_fold

                sizes = scale, summaries, pieces, chunks
                return hopper_fold(y, z, self.gate, *sizes, decay, reverse)
            config = fold_config(DY, DZ, z.dtype)
            blocks = ceil_div(DY, config.rows) * ceil_div(DZ, config.columns)
            operand, precision = _operand(z.dtype)
            return Launch(
                fold_kernel,
                blocks * heads * batch * summaries,
                [
                    scale,
                    batch,
                    pieces,
                    chunks,
                    *y.stride()[:3],
                    *z.stride()[:3],
                    *self.gate.stride()[:3],
                ],
                HEADS=heads,
                Y_GROUP=heads // y.shape[2],
                Z_GROUP=1,
                DY=DY,
                DZ=DZ,
                BY=config.rows,
                BZ=config.columns,
                C=self.chunk if self.frames else config.chunk,
                DECAY=decay,
                REVERSE=reverse,
                OPERAND=operand,
                PRECISION=precision,
                num_warps=config.warps,
                STAGES=config.stages,
            )

        fold = self.calls.once(("fold", reverse, z.stride()), make)
        fold(y, z, self.gate, *self._framed, A, B, table)
        return A, B

    @property
    def _framed(self) -> tuple[Tensor, Tensor, Tensor]:
        """halves, steps and counts of the frames; any tensors where there are none."""
        if self.frames is None:
            return self.table, self.table, self.table
        return self.frames.halves, self.frames.steps, self.frames.counts

    def _run(
        self,
        name: str,
        operands: tuple[Tensor, Tensor, Tensor],
        states: Tensor,
        other: Tensor | None = None,
        gate: _Gate | None = None,
    ) -> Tensor:
        """One of the passes "o", "dv", "dq", "dk" (see the kernels), at v's heads."""
        x, y, z = operands
        if other is None or self.frames is not None:
            other = z
        transposed = name in ("dq", "dk")
        dtype = torch.float32 if self.frames and transposed else self.v.dtype
        heads = self.v.shape[2]
        out = torch.empty(*x.shape[:2], heads, z.shape[-1], dtype=dtype, device=z.device)
        saved = shares = flows = states
        if gate is not None:
            saved, flows, shares = gate.saved, gate.flows, gate.shares.get(name, states)

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
                BLOCK[self.decay],
                len(self.blocks),
                self.scale,
                {"diagonal": "value" if transposed else "key"}.get(self.decay, self.decay),
                reverse=name in ("dv", "dk"),
                transposed=transposed,
                gated=gate is not None,
                frames=self.frames,
            )
            if not self.hopper:
                return _general_launch(p)
            from seqpar.kernels.hopper import hopper_launch

            return hopper_launch(p)

        run = self.calls.once((name, gate is None, states.shape[1]), make)
        run(x, y, z, other, out, self.gate, states, saved, shares, flows, *self._framed, self.table)
        return out


def _general_launch(p: Pass) -> Launch:
    batch, _, heads, DZ = p.out.shape
    DY = p.y.shape[-1]
    config = run_config(DY, DZ, p.x.dtype)
    operand, precision = _operand(p.x.dtype)
    strides = (stride for x in (p.x, p.y, p.z, p.other, p.gate) for stride in x.stride()[:3])
    return Launch(
        run_kernel,
        ceil_div(DZ, config.columns) * heads * batch * len(p.table),
        [*p.numbers, *strides, *p.state_strides],
        HEADS=heads,
        **p.groups,
        DY=DY,
        DZ=DZ,
        BY=padded(DY),
        BZ=config.columns,
        C=p.frames.chunk if p.frames else config.chunk,
        DECAY=p.decay,
        REVERSE=p.reverse,
        GATE=p.gated,
        OPERAND=operand,
        PRECISION=precision,
        SPAN=p.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _is_for_hopper(scale: float, *operands: Tensor) -> bool:
    if not is_hopper(operands[0].device):
        return False
    from seqpar.kernels.hopper import fits

    return scale > 0 and fits(*operands)


def _dense(x: Tensor) -> Tensor:
    """x with its channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _ungroup(dx: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from those of its copies in each head of v."""
    if dx.shape[2] == x.shape[2]:
        return dx
    return dx.unflatten(2, (x.shape[2], -1)).sum(3)


def _operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What products are formed in. fp16 could hold neither the state nor a frame's factors.

    fp32 is taken as the sum of three bf16 numbers: three TF32 products are as exact themselves, but
    tensor cores truncate sums, and add up twice as many terms at once in bf16.
    """
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "bf16x6" if isinstance(run_kernel, JITFunction) else "ieee"

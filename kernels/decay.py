"""Linear attention with no, scalar or diagonal decay on GPUs: the Triton kernels, launched.

Forward: fold the pieces that hand a state on, scan, run. Backward: the same with gradients; dq goes
forward through the tokens again, dk and dv backwards, and nothing is kept from the forward pass but
the states that entered the pieces.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.decay_kernels import run_kernel
from seqpar.kernels.passes import Pass
from seqpar.kernels.pieces import Late, Pieces
from seqpar.kernels.state_kernels import fold_kernel, gate_kernel, scan_kernel
from seqpar.kernels.transition import Decay, Identity, Transition
from seqpar.kernels.tuned import BLOCK, fold_config, is_hopper, padded, piece_tokens, run_config


@dataclass(frozen=True)
class _Gate:
    """What the passes of dq and dk leave for the gradient of the decays (see the kernels)."""

    shares: dict[str, Tensor]
    flows: Tensor  # [B, H, lines, blocks], or of each chunk [B, blocks, chunks, H, K]
    saved: Tensor  # states at the ends of blocks, [B, saves, H, K, V] in the passes' own order


@dataclass(frozen=True)
class TritonLinear:
    """Implements `seqpar.kernels.family.Family`. decay: "none", "scalar" or "diagonal"."""

    decay: str

    @property
    def transition(self) -> Transition:
        return Identity() if self.decay == "none" else Decay()

    def piece_tokens(self, k: Tensor, v: Tensor) -> int:
        heads = v.shape[0] * v.shape[2]
        if self._is_for_hopper(1.0, k, v):  # a processor holds one program, two of small ones
            held = 1 if max(k.shape[3], v.shape[3]) > 64 else 2
            return piece_tokens(v.shape[1], triton.cdiv(heads, held), v.device)
        columns = run_config(k.shape[3], v.shape[3], v.dtype).columns
        held = 4
        programs = heads * triton.cdiv(v.shape[3], columns)
        return piece_tokens(v.shape[1], triton.cdiv(programs, held), v.device)

    def summarize(
        self, k: Tensor, v: Tensor, gates: Sequence[Tensor], pieces: Pieces
    ) -> tuple[Tensor, Tensor]:
        table = pieces.table("left", lambda: _starts(pieces, pieces.left), k.device)
        return self._fold(k, v, gates, 1.0, table, reverse=False)

    def summarize_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
        do: Tensor,
    ) -> tuple[Tensor, Tensor]:
        table = pieces.table("entered", lambda: _starts(pieces, pieces.entered), q.device)
        return self._fold(q, do, gates, scale, table, reverse=True)

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
        runs = pieces.backward if backwards else pieces.forward
        leaving = torch.zeros_like(arriving)
        if not runs:
            return leaving
        name = "backward" if backwards else "forward"
        table = pieces.table(name, lambda: [run.row for run in runs], B.device)
        batch, summaries, heads, DY, DZ = B.shape
        rows = 8
        scan_kernel[(len(runs) * batch * heads * triton.cdiv(DY, rows),)](
            A,
            B,
            arriving,
            B if states is None else states,
            leaving,
            table,
            batch,
            summaries,
            0 if states is None else states.shape[1],
            arriving.shape[1],
            HEADS=heads,
            DY=DY,
            DZ=DZ,
            BY=rows,
            PADDED=triton.next_power_of_2(DZ),
            DECAY=self._along("key"),
            STEP=-1 if backwards else 1,
            STORE=states is not None,
        )
        return leaving

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
        entering: Late,
    ) -> Tensor:
        hopper = self._is_for_hopper(scale, q, k, v)
        return self._run("o", (q, k, v), gates, scale, pieces, hopper, entering())

    def run_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
        entering: Tensor,
        do: Tensor,
        leaving: Late,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        hopper = self._is_for_hopper(scale, q, k, v, do)
        gate = self._gate(k, v, pieces, hopper) if any(wanted) else None
        rest = gates, scale, pieces, hopper
        dq = self._run("dq", (do, v, k), *rest, entering, q, gate)
        adjoints = leaving()
        dk = self._run("dk", (v, do, q), *rest, adjoints, k, gate)
        dv = self._run("dv", (k, q, do), *rest, adjoints)
        gradients: list[Tensor | None] = [_ungroup(dq, q), _ungroup(dk, k), dv]
        if gate is not None:
            gradients.append(self._d_gate(gate, v, pieces).to(gates[0].dtype))
        elif gates:
            gradients.append(None)
        return gradients

    def _along(self, axis: str) -> str:
        return axis if self.decay == "diagonal" else self.decay

    def _gate(self, k: Tensor, v: Tensor, pieces: Pieces, hopper: bool) -> _Gate:
        batch, tokens, heads, V = v.shape
        K = k.shape[-1]

        def empty(*shape: int) -> Tensor:
            return torch.empty(batch, *shape, dtype=torch.float32, device=k.device)

        blocks, saves = pieces.once("saves", lambda: _blocks(pieces))
        saved = empty(saves, heads, K, V)
        if self.decay == "diagonal":
            shares = empty(tokens, heads, K)
            chunks = BLOCK // run_config(V, K, k.dtype).chunk
            pulls = empty(len(blocks), chunks, heads, K)
            return _Gate({"dq": shares, "dk": shares}, pulls, saved)
        lines = K // 16 if hopper else triton.cdiv(K, run_config(V, K, k.dtype).columns)
        shares, others = (empty(heads, lines, tokens) for _ in range(2))
        return _Gate({"dq": shares, "dk": others}, empty(heads, lines, len(blocks)), saved)

    def _d_gate(self, gate: _Gate, v: Tensor, pieces: Pieces) -> Tensor:
        """The gradient of the decays, [B, T, H, 1 or K]."""
        if self.decay == "diagonal":
            return gate.shares["dk"]
        batch, tokens, heads, _ = v.shape
        d_gate = torch.empty(batch, tokens, heads, 1, dtype=torch.float32, device=v.device)
        table = pieces.table("blocks", lambda: _blocks(pieces)[0], v.device)
        gate_kernel[(len(table) * heads * batch,)](
            gate.shares["dq"],
            gate.shares["dk"],
            gate.flows,
            d_gate,
            table,
            tokens,
            len(table),
            HEADS=heads,
            LINES=gate.flows.shape[2],
            SIZE=BLOCK,
        )
        return d_gate

    def _is_for_hopper(self, scale: float, *operands: Tensor) -> bool:
        if not is_hopper(operands[0].device):
            return False
        from seqpar.kernels.hopper import fits

        return scale > 0 and fits(self.decay, *operands)

    def _fold(
        self,
        y: Tensor,
        z: Tensor,
        gates: Sequence[Tensor],
        scale: float,
        table: Tensor,
        *,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        y, z = _dense(y), _dense(z)
        batch, _, heads, DZ = z.shape
        DY, pieces = y.shape[-1], len(table)
        gate = _dense(gates[0]) if gates else y
        width = {"none": 0, "scalar": 1, "diagonal": DY}[self.decay]
        A = z.new_empty(batch, pieces, heads, width, int(width > 0), dtype=torch.float32)
        B = z.new_empty(batch, pieces, heads, DY, DZ, dtype=torch.float32)
        config = fold_config(DY, DZ, z.dtype, self.decay == "diagonal")
        blocks = triton.cdiv(DY, config.rows) * triton.cdiv(DZ, config.columns)
        operand, precision = _operand(z.dtype)
        if not pieces:
            return A, B
        fold_kernel[(blocks * heads * batch * pieces,)](
            y,
            z,
            gate,
            A,
            B,
            table,
            scale,
            batch,
            *y.stride()[:3],
            *z.stride()[:3],
            *gate.stride()[:3],
            HEADS=heads,
            Y_GROUP=heads // y.shape[2],
            Z_GROUP=1,
            DY=DY,
            DZ=DZ,
            BY=config.rows,
            BZ=config.columns,
            C=config.chunk,
            DECAY=self._along("key"),
            REVERSE=reverse,
            OPERAND=operand,
            PRECISION=precision,
            num_warps=config.warps,
            STAGES=config.stages,
        )
        return A, B

    def _run(
        self,
        name: str,
        operands: tuple[Tensor, Tensor, Tensor],
        gates: Sequence[Tensor],
        scale: float,
        pieces: Pieces,
        hopper: bool,
        states: Tensor,
        other: Tensor | None = None,
        gate: _Gate | None = None,
    ) -> Tensor:
        """One of the passes "o", "dv", "dq", "dk" (see the kernels), at v's heads."""
        x, y, z = (_dense(operand) for operand in operands)
        heads = max(operand.shape[2] for operand in (x, y, z))
        out = torch.empty(*x.shape[:2], heads, z.shape[-1], dtype=z.dtype, device=z.device)
        transposed = name in ("dq", "dk")
        launch = Pass(
            x,
            y,
            z,
            x if other is None else _dense(other),
            _dense(gates[0]) if gates else x,
            states,
            states if gate is None else gate.saved,
            out,
            states if gate is None else gate.shares[name],
            states if gate is None else gate.flows,
            pieces.table("run", lambda: _run_rows(pieces), x.device),
            len(pieces.once("saves", lambda: _blocks(pieces))[0]),
            scale,
            self._along("value" if transposed else "key"),
            reverse=name in ("dv", "dk"),
            transposed=transposed,
            gated=gate is not None,
        )
        if hopper:
            from seqpar.kernels.hopper import run_hopper

            run_hopper(launch)
        else:
            self._launch(launch)
        return out

    def _launch(self, p: Pass) -> None:
        batch, _, heads, DZ = p.out.shape
        DY = p.y.shape[-1]
        config = run_config(DY, DZ, p.x.dtype)
        operand, precision = _operand(p.x.dtype)
        run_kernel[(triton.cdiv(DZ, config.columns) * heads * batch * len(p.table),)](
            p.x,
            p.y,
            p.z,
            p.gate,
            p.other,
            p.entering,
            p.saved,
            p.out,
            p.shares,
            p.flows,
            p.table,
            p.scale,
            *p.sizes,
            *p.x.stride()[:3],
            *p.y.stride()[:3],
            *p.z.stride()[:3],
            *p.other.stride()[:3],
            *p.gate.stride()[:3],
            *p.state_strides,
            HEADS=heads,
            DY=DY,
            DZ=DZ,
            BY=padded(DY),
            BZ=config.columns,
            C=config.chunk,
            DECAY=p.decay,
            REVERSE=p.reverse,
            GATE=p.gated,
            OPERAND=operand,
            PRECISION=precision,
            EVERY=BLOCK // config.chunk,
            STAGES=config.stages,
            num_warps=config.warps,
            **p.groups,
        )


def _dense(x: Tensor) -> Tensor:
    """x with its channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _ungroup(dx: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from those of its copies in each head of v."""
    if dx.shape[2] == x.shape[2]:
        return dx
    return dx.unflatten(2, (x.shape[2], -1)).sum(3)


def _operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What products are formed in. fp16 could hold neither the state nor a block's factors."""
    return (tl.bfloat16, "ieee") if dtype == torch.bfloat16 else (tl.float32, "tf32x3")


def _starts(pieces: Pieces, which: Iterable[int]) -> list[tuple[int, int]]:
    spans = [pieces.spans[i] for i in which]
    return [(start, stop - start) for start, stop in spans]


def _blocks(pieces: Pieces) -> tuple[list[tuple[int, int]], int]:
    """First token and tokens of each block, and how many of them save a state."""
    blocks, saves = [], 0
    for start, stop, _, _, saved in _cut(pieces):
        firsts = range(start, stop, BLOCK)
        blocks += [(first, min(BLOCK, stop - first)) for first in firsts]
        saves += saved
    return blocks, saves


def _cut(pieces: Pieces) -> Iterator[tuple[int, int, int, int, int]]:
    """Each piece's start, stop, number, blocks, and how many of these save a state.

    At the end of a piece that no state leaves none is needed: its gradient is zero.
    """
    left = set(pieces.left)
    for i, (start, stop) in enumerate(pieces.spans):
        count = triton.cdiv(stop - start, BLOCK)
        yield start, stop, i, count, count if i in left else count - 1


def _run_rows(pieces: Pieces) -> list[tuple[int, ...]]:
    entered = {piece: slot for slot, piece in enumerate(pieces.entered)}
    left = {piece: slot for slot, piece in enumerate(pieces.left)}
    rows: list[tuple[int, ...]] = []
    blocks, saves = 0, 0
    for start, stop, i, count, saved in _cut(pieces):
        slots = entered.get(i, -1), left.get(i, -1)
        rows.append((start, stop - start, *slots, blocks, saves, saves + saved))
        blocks, saves = blocks + count, saves + saved
    return rows

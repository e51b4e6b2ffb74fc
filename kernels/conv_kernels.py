"""Triton kernels of the short causal convolution: programs walk along tokens, taps in registers.

A program has some channels and some consecutive tokens of one range. It reads a token once and
keeps the last WIDTH of them, so neither pass moves a tensor more than once, but for the few tokens
around a program's own. UNROLL tokens are loaded at a time, ahead of their use.

Strides come in units of X_UNIT or Y_UNIT elements, which tells the compiler how wide it can load.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    """FAST, on GPUs: four instructions, where care for subnormal numbers makes them eleven."""
    if FAST:
        gate = tl.inline_asm_elementwise(
            "mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0;"  # 2 ** (-z log2(e))
            "add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f",
            [z],
            tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        gate = tl.sigmoid(z)
    return gate


@triton.jit
def _place(length, ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, RANGES):
    """This program's channels, first token, range and batch."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    chunk = pid // BLOCKS
    chunks = tl.cdiv(length, ROWS)
    cols = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    part = (chunk // chunks % RANGES).to(tl.int64)
    batch = (chunk // chunks // RANGES).to(tl.int64)
    return cols, chunk % chunks * ROWS, part, batch


@triton.jit
def _row(x, token, length, stride, offsets, inside):
    """The channels of one token; zeros outside the range [0, length)."""
    mask = inside & (token >= 0) & (token < length)
    return tl.load(x + token.to(tl.int64) * stride + offsets, mask=mask, other=0.0)


@triton.jit
def _before(x, halo, first, length, stride, row, offsets, cols, inside, WIDTH, HALO):
    """The WIDTH-1 tokens before `first`, nearest first, and one place more, as the window has.

    halo: where token 0 of the range would lie, were its tokens there too; `row` apart.
    """
    window = ()
    for j in tl.static_range(1, WIDTH):
        earlier = _row(x, first - j, length, stride, offsets, inside)
        if HALO:
            mask = inside & (first < j)
            earlier += tl.load(halo + (first - j) * row + cols, mask=mask, other=0.0)
        window = window + (earlier.to(tl.float32),)
    return window + (tl.zeros(cols.shape, tl.float32),)


@triton.jit
def _parameters(weight, bias, cols, inside, WIDTH, BIAS):
    """The weights of each tap, that of the token itself first, and the bias."""
    taps = ()
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight + cols * WIDTH + (WIDTH - 1 - j), mask=inside, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    constant = tl.zeros(cols.shape, tl.float32)
    if BIAS:
        constant += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    return taps, constant


@triton.jit
def _seen(seen, token, length, WIDTH, PACKED):
    """How many tokens before this one belong to its document, as far as taps reach."""
    count = WIDTH - 1
    if PACKED:
        count = tl.load(seen + token, mask=token < length, other=0).to(tl.int32)
    return count


@triton.jit
def _visible(window, seen, WIDTH, PACKED):
    """The window without the tokens of documents before."""
    found = window[:1]
    for j in tl.static_range(1, WIDTH):
        if PACKED:
            found = found + (tl.where(seen >= j, window[j], 0.0),)
        else:
            found = found + (window[j],)
    return found


@triton.jit
def _convolved(window, taps, constant, WIDTH):
    for j in tl.static_range(WIDTH):
        constant += window[j] * taps[j]
    return constant


@triton.jit
def _d_convolved(dy, visible, taps, constant, WIDTH, SILU, FAST):
    """The gradient of a token's sum of taps."""
    dz = dy.to(tl.float32)
    if SILU:
        z = _convolved(visible, taps, constant, WIDTH)
        gate = sigmoid(z, FAST)
        dz = dz * gate * (1.0 + z * (1.0 - gate))
    return dz


@triton.jit
def _handed_on(pending, dz, taps, seen, WIDTH, PACKED):
    """The gradients of this token and those before, which dz is added to; the last is complete."""
    found = (dz * taps[0],)
    for j in tl.static_range(1, WIDTH):
        passed = dz
        if PACKED:
            passed = tl.where(seen >= j, dz, 0.0)
        found = found + (pending[j - 1] + passed * taps[j],)
    return found


@triton.jit(do_not_specialize=["batches", "length"])
def conv_kernel(
    x, halo, weight, bias, seen, y,
    batches, length,
    xb, xt, xh,
    X_UNIT: tl.constexpr, CHANNELS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, HALO: tl.constexpr, PACKED: tl.constexpr,
    RANGES: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """y_t = SiLU(Σ_j weight[:, WIDTH-1-j] x_{t-j} + bias).

    x [B, T, H, DIM] by its strides, H * DIM = CHANNELS and T = RANGES * length; halo [RANGES *
    (WIDTH-1), B, CHANNELS], the tokens before each range; weight [CHANNELS, WIDTH]; seen [T]; y [B,
    T, CHANNELS]. A program has ROWS tokens, a multiple of UNROLL.
    """
    cols, first, part, batch = _place(length, ROWS, CHANNELS, BLOCK, RANGES)
    inside = cols < CHANNELS
    offsets = cols // DIM * (xh * X_UNIT) + cols % DIM
    stride = xt * X_UNIT
    row = batches.to(tl.int64) * CHANNELS
    x += batch * xb * X_UNIT + part * length * stride
    y += (batch * RANGES + part) * length * CHANNELS
    halo += (part + 1) * (WIDTH - 1) * row + batch * CHANNELS
    seen += part * length

    taps, constant = _parameters(weight, bias, cols, inside, WIDTH, BIAS)
    window = _before(x, halo, first, length, stride, row, offsets, cols, inside, WIDTH, HALO)
    for step in range(0, ROWS, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):
            rows = rows + (_row(x, first + step + i, length, stride, offsets, inside),)
        for i in tl.static_range(UNROLL):
            token = first + step + i
            window = (rows[i].to(tl.float32),) + window[: WIDTH - 1]
            visible = _visible(window, _seen(seen, token, length, WIDTH, PACKED), WIDTH, PACKED)
            z = _convolved(visible, taps, constant, WIDTH)
            if SILU:
                z = z * sigmoid(z, FAST)
            target = y + token.to(tl.int64) * CHANNELS + cols
            tl.store(target, z.to(y.dtype.element_ty), mask=inside & (token < length))


@triton.jit(do_not_specialize=["batches", "length"])
def conv_backward_kernel(
    x, halo, weight, bias, seen, dy, dx, d_halo, sums,
    batches, length,
    xb, xt, xh, yb, yt, yh,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, CHANNELS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, HALO: tl.constexpr,
    PACKED: tl.constexpr, RANGES: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradients, from dz, those of the sums before the activation, which are formed again.

        dx_p = Σ_j weight[:, WIDTH-1-j] dz_{p+j};  dweight[:, WIDTH-1-j] = Σ_t dz_t x_{t-j}

    As conv_kernel; dy [B, T, H, DIM] by its strides; dx [B, T, CHANNELS]; d_halo as halo; sums
    [programs along tokens, WIDTH, or with a bias WIDTH+1, CHANNELS], each program's share of
    dweight, its columns in order, and of the bias's gradient.
    """
    REACH: tl.constexpr = WIDTH - 1
    cols, first, part, batch = _place(length, ROWS, CHANNELS, BLOCK, RANGES)
    inside = cols < CHANNELS
    offsets = cols // DIM * (xh * X_UNIT) + cols % DIM
    y_offsets = cols // DIM * (yh * Y_UNIT) + cols % DIM
    stride = xt * X_UNIT
    y_stride = yt * Y_UNIT
    row = batches.to(tl.int64) * CHANNELS
    x += batch * xb * X_UNIT + part * length * stride
    dy += batch * yb * Y_UNIT + part * length * y_stride
    dx += (batch * RANGES + part) * length * CHANNELS
    halo += (part + 1) * REACH * row + batch * CHANNELS
    d_halo += (part + 1) * REACH * row + batch * CHANNELS
    seen += part * length

    taps, constant = _parameters(weight, bias, cols, inside, WIDTH, BIAS)
    window = _before(x, halo, first, length, stride, row, offsets, cols, inside, WIDTH, HALO)
    zeros = tl.zeros([BLOCK], tl.float32)
    d_bias = zeros
    d_taps = ()
    pending = ()
    for _ in tl.static_range(WIDTH):
        d_taps = d_taps + (zeros,)
        pending = pending + (zeros,)
    for step in range(0, ROWS, UNROLL):
        rows = ()
        d_rows = ()
        for i in tl.static_range(UNROLL):
            rows = rows + (_row(x, first + step + i, length, stride, offsets, inside),)
            d_rows = d_rows + (_row(dy, first + step + i, length, y_stride, y_offsets, inside),)
        for i in tl.static_range(UNROLL):
            token = first + step + i
            window = (rows[i].to(tl.float32),) + window[:REACH]
            count = _seen(seen, token, length, WIDTH, PACKED)
            visible = _visible(window, count, WIDTH, PACKED)
            dz = _d_convolved(d_rows[i], visible, taps, constant, WIDTH, SILU, FAST)
            pending = _handed_on(pending, dz, taps, count, WIDTH, PACKED)
            d_bias += dz
            before = d_taps
            d_taps = ()
            for j in tl.static_range(WIDTH):
                d_taps = d_taps + (before[j] + dz * visible[j],)
            done = token - REACH  # before the program's first token: the other program's, or halo
            d_row = pending[REACH].to(dx.dtype.element_ty)
            mask = inside & (done >= first) & (done < length)
            tl.store(dx + done.to(tl.int64) * CHANNELS + cols, d_row, mask=mask)
            if HALO:
                tl.store(d_halo + done * row + cols, d_row, mask=inside & (done < 0))

    last = first + ROWS
    for i in tl.static_range(REACH):  # the next program's tokens complete dx of this one's
        token = last + i
        x_row = _row(x, token, length, stride, offsets, inside)
        d_row = _row(dy, token, length, y_stride, y_offsets, inside)
        window = (x_row.to(tl.float32),) + window[:REACH]
        count = _seen(seen, token, length, WIDTH, PACKED)
        visible = _visible(window, count, WIDTH, PACKED)
        dz = _d_convolved(d_row, visible, taps, constant, WIDTH, SILU, FAST)
        pending = _handed_on(pending, dz, taps, count, WIDTH, PACKED)
        done = token - REACH
        d_row = pending[REACH].to(dx.dtype.element_ty)
        mask = inside & (done < length)
        tl.store(dx + done.to(tl.int64) * CHANNELS + cols, d_row, mask=mask)

    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    sums += (tl.program_id(0) // BLOCKS).to(tl.int64) * ((WIDTH + BIAS) * CHANNELS) + cols
    for j in tl.static_range(WIDTH):
        tl.store(sums + (REACH - j) * CHANNELS, d_taps[j], mask=inside)
    if BIAS:
        tl.store(sums + WIDTH * CHANNELS, d_bias, mask=inside)

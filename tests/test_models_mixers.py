"""Each mixer is what its paper says, by token loops; it refuses what it would have to ignore."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, run_ranks
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron_setup import Rank, Setting, tiny
from torch import Tensor

import seqpar
from seqpar.comm import Communicator
from seqpar.kernels import reference
from seqpar.models.groups import Heads
from seqpar.models.sequence import SequenceParallelParams
from seqpar.models.specs import linear_attention_spec, softmax_attention_spec

HEADS, KEY, VALUE, TOKENS = 4, 4, 8, 13
SIZES: dict[str, Any] = {"num_heads": HEADS, "head_dim": KEY, "value_head_dim": VALUE}


def mixer(spec: ModuleSpec, **config: Any) -> Any:
    """The module of a spec as a Megatron layer builds it, with parameters away from their start."""
    state = Rank(tiny("G", hidden_size=32), Setting())
    settings = copy.copy(state.config)
    for name, value in config.items():
        setattr(settings, name, value)
    module = build_module(spec, config=settings, layer_number=1, pg_collection=state.groups)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return module


def check(spec: ModuleSpec, direct: Callable[[Any, Tensor], Tensor]) -> None:
    """The module's output and gradients against `direct(module, x [b, s, h])`."""
    torch.manual_seed(3)
    module = mixer(spec)
    x = torch.randn(2, TOKENS, 32, requires_grad=True)
    weight = torch.randn(2, TOKENS, 32)
    out, bias = module(x.transpose(0, 1))
    expected = direct(module, x)
    assert bias is None
    assert_close("output", out.transpose(0, 1), expected, 1e-5)
    inputs = {"x": x, **dict(module.named_parameters())}
    losses = (out.transpose(0, 1) * weight).sum(), (expected * weight).sum()
    actual, wanted = (torch.autograd.grad(loss, list(inputs.values())) for loss in losses)
    for name, a, b in zip(inputs, actual, wanted, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-4)


def projected(module: Any, x: Tensor, heads: int, *widths: int) -> tuple[Tensor, ...]:
    return F.linear(x, module.in_proj.weight).unflatten(-1, (heads, -1)).split(widths, -1)


def normalised(module: Any, o: Tensor) -> Tensor:
    square = o.square().mean(-1, keepdim=True)
    return o * (square + module.config.layernorm_epsilon).rsqrt() * module.norm.weight


def finish(module: Any, o: Tensor, gate: Tensor) -> Tensor:
    """Each head's norm, times its gate, projected."""
    gated = normalised(module, o) * gate.reshape(o.shape)
    return F.linear(gated.flatten(2), module.out_proj.weight)


def direct_gla(module: Any, x: Tensor) -> Tensor:
    q, k, v, gate = projected(module, x, HEADS, KEY, KEY, VALUE, VALUE)
    low = F.linear(x, module.decay_down.weight)
    logits = F.linear(low, module.decay_up.weight, module.decay_up.bias)
    log_decay = torch.log(torch.sigmoid(logits.unflatten(-1, (HEADS, KEY)))) / 16
    return finish(module, reference.linear_attention(q, k, v, log_decay)[0], F.silu(gate))


def convolved(module: Any, keys: int, *parts: Tensor) -> list[Tensor]:
    """Each channel's short convolution and SiLU; the last part by heads of values."""
    found = []
    widths = [x.shape[-1] for x in parts]
    bias = getattr(module, "conv_bias", torch.zeros(keys * sum(widths))).view(keys, -1)
    weights = zip(module.conv_weight.split(widths, 1), bias.split(widths, 1), strict=True)
    for channels, (taps, shift) in zip(parts, weights, strict=True):
        padded = F.pad(channels.flatten(2).mT, (3, 0))
        y = F.conv1d(padded, taps.flatten(0, 1)[:, None], shift.flatten(), groups=padded.shape[1])
        found.append(F.silu(y).mT.unflatten(-1, (keys, -1)))
    found[-1] = found[-1].reshape(*found[-1].shape[:2], HEADS, VALUE)
    return found


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def direct_gated_deltanet(module: Any, x: Tensor) -> Tensor:
    keys = len(module.conv_weight)
    each = HEADS // keys
    widths = (KEY, KEY, each * VALUE, each, each, each * VALUE)
    *qkv, b, a, gate = projected(module, x, keys, *widths)
    q, k, v = convolved(module, keys, *qkv)
    log_decay = -module.A_log.exp() * F.softplus(a.flatten(2) + module.dt_bias)
    beta = torch.sigmoid(b.flatten(2))
    o, _ = reference.delta_attention(unit(q), unit(k), v, beta, log_decay)
    return finish(module, o, F.silu(gate))


def direct_kda(module: Any, x: Tensor) -> Tensor:
    keys = len(module.conv_weight)
    each = HEADS // keys
    *qkv, b = projected(module, x, keys, KEY, KEY, each * VALUE, each)
    q, k, v = convolved(module, keys, *qkv)
    low_decay, low_gate = F.linear(x, module.gate_down.weight).chunk(2, -1)
    steps = F.linear(low_decay, module.decay_up.weight).unflatten(-1, (HEADS, KEY))
    log_decay = -module.A_log.exp()[:, None] * F.softplus(steps + module.dt_bias.view(HEADS, KEY))
    beta = torch.sigmoid(b.flatten(2))
    o, _ = reference.delta_attention(unit(q), unit(k), v, beta, log_decay)
    gate = F.linear(low_gate, module.gate_up.weight, module.gate_up.bias)
    return finish(module, o, torch.sigmoid(gate))


def direct_mamba2(module: Any, x: Tensor) -> Tensor:
    """The recurrence of the state-space model as its paper writes it."""
    groups = len(module.conv_weight)
    each = HEADS // groups
    widths = (KEY, KEY, each * VALUE, each, each * VALUE)
    *cbx, dt, z = projected(module, x, groups, *widths)
    c, b, x = convolved(module, groups, *cbx)
    c, b = (y.repeat_interleave(each, 2) for y in (c, b))
    step = F.softplus(dt.flatten(2) + module.dt_bias)
    kept = torch.exp(-module.A_log.exp() * step)
    state, found = torch.zeros(len(x), HEADS, KEY, VALUE), []
    for t in range(TOKENS):
        new = (step[:, t, :, None] * b[:, t])[..., None] * x[:, t, :, None]
        state = kept[:, t, :, None, None] * state + new
        found.append((c[:, t, :, None] @ state).squeeze(2) + module.D[:, None] * x[:, t])
    o = torch.stack(found, 1).unflatten(2, (groups, each)).flatten(3)
    return F.linear(normalised(module, o * F.silu(z)).flatten(2), module.out_proj.weight)


def turned(x: Tensor, base: float, dim: int) -> Tensor:
    """The first `dim` channels of x [b, t, heads, ...], turned by the tokens' positions."""
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
    first, second, rest = x.split([dim // 2, dim // 2, x.shape[-1] - dim], -1)
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([pairs.real, pairs.imag, rest], -1)


def direct_retention(module: Any, x: Tensor) -> Tensor:
    """In its parallel form: scores decay with distance."""
    q, k, v, gate = projected(module, x, HEADS, KEY, KEY, VALUE, VALUE)
    q, k = (turned(y, 50.0, KEY) for y in (q, k))
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    kept = torch.tensor([31 / 32, 63 / 64, 127 / 128, 255 / 256])[:, None, None] ** distance.clip(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * kept.tril() * KEY**-0.5
    return finish(module, torch.einsum("bhqk,bkhd->bqhd", scores, v), F.silu(gate))


def direct_softmax(module: Any, x: Tensor) -> Tensor:
    group, dim = 2, 8
    q, k, v = projected(module, x, 2, group * dim, dim, dim)
    q = q.unflatten(-1, (group, dim)).flatten(2, 3)
    k, v = (y.repeat_interleave(group, 2) for y in (k, v))
    q, k = (turned(y, 100.0, 4) for y in (q, k))  # half of each head
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * dim**-0.5
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    o = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return F.linear(o.flatten(2), module.out_proj.weight)


@pytest.mark.parametrize(
    ("spec", "direct"),
    [
        (linear_attention_spec("gla", **SIZES, gate_rank=4), direct_gla),
        (linear_attention_spec("gated_deltanet", **SIZES), direct_gated_deltanet),
        (linear_attention_spec("gated_deltanet", **SIZES, key_heads=2), direct_gated_deltanet),
        (linear_attention_spec("kda", **SIZES, gate_rank=4), direct_kda),
        (linear_attention_spec("kda", **SIZES, gate_rank=4, key_heads=2), direct_kda),
        (linear_attention_spec("mamba2", **SIZES), direct_mamba2),
        (linear_attention_spec("mamba2", **SIZES, key_heads=2), direct_mamba2),
        (linear_attention_spec("retention", **SIZES, rope_base=50.0), direct_retention),
        (softmax_attention_spec(rope_base=100.0, rope_fraction=0.5), direct_softmax),
    ],
    ids=str.split("gla gdn gdn-shared kda kda-shared mamba2 mamba2-shared retention softmax"),
)
def test_mixer_is_its_definition(spec: ModuleSpec, direct: Callable[[Any, Tensor], Tensor]) -> None:
    run_ranks(lambda rank: check(spec, direct), 1)


class SomeRank(Communicator):
    """A communicator that is only asked who it is."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def test_rotary_positions_are_exact_far_into_a_long_sequence() -> None:
    far = 8_000_000
    sp = seqpar.SequenceParallel(layout=seqpar.Layout(far, 1000), comm=SomeRank(999, 1000))
    cos, sin = SequenceParallelParams(sp).rotary(8, 10000.0, torch.device("cpu"))
    angle = (far - 1) / 10  # of the last token's second pair; fp32 would be off by 0.03
    assert cos[-1, 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sin[-1, 1].item() == pytest.approx(math.sin(angle), abs=1e-6)


def sharded_softmax(rank: int, kind: str, documents: Any, total: int) -> tuple[Tensor, Tensor]:
    state = Rank(tiny("N"), Setting(context=2))
    torch.manual_seed(5)
    module = build_module(
        softmax_attention_spec(), config=state.config, layer_number=1, pg_collection=state.groups
    )
    x = torch.randn(total, 1, 16)
    layout = seqpar.Layout(total, 2, kind, documents)
    params = SequenceParallelParams(seqpar.SequenceParallel(state.groups.cp, layout))
    out, _ = module(layout.shard(x, rank, dim=0), packed_seq_params=params)
    # Rotary embedding is relative: only true positions give the same for a document by itself.
    alone = [
        module.out_proj(attend_alone(module, x[a:b]))[0] for a, b in itertools.pairwise(documents)
    ]
    return out.detach(), layout.shard(torch.cat(alone), rank, dim=0).detach()


def attend_alone(module: Any, x: Tensor) -> Tensor:
    whole = SequenceParallelParams(seqpar.SequenceParallel(None, seqpar.Layout(len(x), 1)))
    heads = Heads(0, module.heads, module.heads)
    y = heads.by_head(module.in_proj(x)[0])
    return module.mix(y, lambda: y[..., :0], None, heads, whole).flatten(2).transpose(0, 1)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_documents_cut_over_ranks_attend_as_if_alone(kind: str | None) -> None:
    for out, expected in run_ranks(sharded_softmax, 2, kind, (0, 7, 18, 24), 24):
        assert_close("output", out, expected, 1e-5)


def without_params(rank: int, kind: str | None) -> tuple[Tensor, Tensor]:
    """A spec in a foreign model: no SequenceParallelParams, only Megatron's groups."""
    state = Rank(tiny("G"), Setting(context=2))
    torch.manual_seed(5)
    spec = linear_attention_spec("gated_deltanet", **SIZES, layout=kind)
    module = build_module(
        spec, config=state.config, layer_number=1, pg_collection=state.groups, cp_comm_type="p2p"
    )
    x = torch.randn(16, 1, 16)
    layout = seqpar.Layout(16, 2, kind or "zigzag")
    whole = SequenceParallelParams(seqpar.SequenceParallel(None, seqpar.Layout(16, 1)))
    out, _ = module(layout.shard(x, rank, dim=0), None, rotary_pos_emb=torch.ones(1))
    expected, _ = module(x, packed_seq_params=whole)
    return out.detach(), layout.shard(expected, rank, dim=0).detach()


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_spec_alone_in_a_foreign_model(kind: str | None) -> None:
    for out, expected in run_ranks(without_params, 2, kind):
        assert_close("output", out, expected, 1e-5)


def test_unsaid_layout_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"2 context-parallel ranks.*layout=\"zigzag\""):
        run_ranks(without_params, 2, None)


def refused(rank: int, spec: ModuleSpec, config: dict[str, Any], inputs: dict[str, Any]) -> str:
    try:
        module = mixer(spec, **config)
        module(torch.randn(6, 1, 32), **inputs)
    except ValueError as error:
        return str(error)
    return "not refused"


GLA = linear_attention_spec("gla", **SIZES)


@pytest.mark.parametrize(
    ("spec", "config", "inputs", "message"),
    [
        (GLA, {"attention_dropout": 0.1}, {}, "attention_dropout=0.1 .* set it to 0"),
        (GLA, {}, {"attention_mask": torch.ones(1)}, "attention_mask is given, GatedLinear"),
        (GLA, {}, {"inference_context": object()}, "inference_context is given"),
        (GLA, {}, {"a_later_versions_input": 1}, "a_later_versions_input is given"),
        (softmax_attention_spec(), {"qk_layernorm": True}, {}, "qk_layernorm=True .* to False"),
        (softmax_attention_spec(), {}, {"rotary_pos_emb": torch.ones(1)}, "rotary_pos_emb is"),
    ],
)
def test_what_would_be_ignored_is_refused(
    spec: ModuleSpec, config: dict[str, Any], inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(run_ranks(refused, 1, spec, config, inputs)[0])


def test_unknown_mixer_is_refused() -> None:
    with pytest.raises(ValueError, match="name='mamba' must be one of gla, gated_deltanet"):
        linear_attention_spec("mamba", **SIZES)

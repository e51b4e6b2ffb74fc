"""`seqpar plan`: what fits, what does not and what would, and how fast, without a GPU."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from hollow import step_bytes

import seqpar
from seqpar import Layout, SequenceParallel
from seqpar.comm import Communicator
from seqpar.launch import plan
from seqpar.launch.checks import ALONE, Sizes
from seqpar.launch.cluster import CLUSTERS, load_cluster
from seqpar.launch.config import CONFIGS, Config, load_config
from seqpar.launch.count import Count
from seqpar.launch.duration import state_exchange
from seqpar.launch.flops import state_flops, step_flops
from seqpar.launch.peak import memory
from seqpar.models.config import ModelConfig

HYBRID = str(CONFIGS / "hybrid-1.3b.yaml")
A03B = str(CONFIGS / "a0.3b-2b.yaml")
MOE = str(CONFIGS / "a1b-7b.yaml")
H200 = CLUSTERS["h200"]


def run(*words: str) -> tuple[str, int]:
    command = [sys.executable, "-m", "seqpar.launch.cli", "plan", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr, done.returncode


def test_a_run_that_fits_and_that_it_is_told_soon() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text, code = run(HYBRID, "--gpus", "8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor's time, for a machine may be busy with other things
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert (text.splitlines()[-1], code) == ("it fits", 0)
    for part in ("1,308,580,096 parameters", "weights", "optimizer", "states of gla", "tokens/s"):
        assert part in text


def test_a_run_that_does_not_fit_is_told_what_would() -> None:
    text, code = run(HYBRID, "data.sequence_length=1M", "--gpus", "1")
    assert code == 1
    assert "IT DOES NOT FIT" in text
    change = text.splitlines()[-1].partition("): ")[2].split()
    assert "memory.recompute=[linear,softmax,mlp]" in change
    text, code = run(HYBRID, "data.sequence_length=1M", *change, "--gpus", "1")
    assert (text.splitlines()[-1], code) == ("it fits", 0)


def test_more_gpus_where_memory_alone_does_not_help() -> None:
    config = load_config(HYBRID, ["data.sequence_length=8M"])
    found = plan.nearest(config, 2, H200)
    assert found is not None
    assert found[0].fits
    assert "--gpus" in found[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "h300"], "must be one of h200, h100, a100, or a YAML file"),
        (["parallel.tensor=3", "--gpus", "8"], r"parallel.tensor=3 .* divide the number of ranks"),
        (
            ["parallel.expert=3", "data.sequence_length=9K", "--gpus", "9"],
            r"parallel.expert=3 must divide model.num_experts",
        ),
        (
            ["memory.recompute=[linear]", "memory.head_groups=3"],
            r"memory.head_groups=3 must divide the heads of .* on a rank=16; nearest: 2, 4",
        ),
        (["memory.recompute=[gla]"], r"memory.recompute=.* may hold linear, softmax, mlp"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        plan.main([MOE, "parallel.context=null", *words])


def test_a_pipeline_rank_without_layers() -> None:
    words = ["parallel.pipeline=2", "parallel.stages=[24,0]"]
    made = plan.make_plan(load_config(HYBRID, words), 2, H200)
    assert memory(Count(made.config, made.sizes, rank=1))["workspace"] > 0  # of the loss


def test_a_cluster_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("gpu: L40S\nmemory: 44.5\nmatmul: 2e14\ngpus_per_node: 4\n")
    mine = load_cluster(str(path))
    assert (mine.gpu, mine.memory, mine.gpus_per_node) == ("L40S", 44.5, 4)
    config = load_config(HYBRID)
    slow = plan.make_plan(config, 8, mine).seconds["matrix products"]
    assert slow == pytest.approx(3 * plan.make_plan(config, 8, H200).seconds["matrix products"])
    path.write_text("memory: 0\n")
    with pytest.raises(ValueError, match=r"memory=0\.0 must be above 0"):
        load_cluster(str(path))
    for text, message in (("memroy: 80\n", "memroy"), ("gpu: [\n", "not valid YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_cluster(str(path))


@pytest.mark.parametrize(("path", "length", "gpus"), [(HYBRID, "2M", 8), (MOE, "1M", 32)])
def test_search_gives_what_fits_best_first(path: str, length: str, gpus: int) -> None:
    words = [f"data.sequence_length={length}"]
    found = plan.search(load_config(path, words), gpus, H200)
    speeds = [each.tokens_per_second for each, _ in found]
    assert speeds == sorted(speeds, reverse=True)
    assert len(found) > 3
    for each, how in found[:3]:  # what it says can be asked for
        again = plan.make_plan(load_config(path, [*words, *how.split()]), gpus, H200)
        assert again.fits
        assert again.tokens_per_second == pytest.approx(each.tokens_per_second)


def test_savers_cost_time_and_save_memory() -> None:
    config = load_config(HYBRID, ["data.sequence_length=8M"])
    plans = [
        (way, plan.make_plan(plan.changed(config, way), 8, H200)) for way in plan.savers(config)
    ]
    saving: set[str] = set()
    for way, less in plans:
        for beyond, more in plans:
            if way.items() < beyond.items():  # the same and something else
                names = beyond.keys() - way.keys()
                room = [sum(each.memory.values()) for each in (less, more)]
                if "memory.keep_every" in names:  # what it saves may have been the host's
                    room = [size + each.host for size, each in zip(room, (less, more), strict=True)]
                assert room[1] <= room[0]
                assert sum(more.seconds.values()) >= sum(less.seconds.values())
                saving |= names if room[1] < room[0] else set()
    names = {"offload_layers", "head_groups", "keep_attention", "keep_every"}
    assert saving >= {f"memory.{name}" for name in names}


def test_heads_in_groups_are_what_makes_two_million_tokens_a_gpu_fit() -> None:
    config = load_config(HYBRID, ["data.sequence_length=2M"])
    found = plan.nearest(config, 1, H200)
    assert found is not None
    assert "memory.head_groups=4" in found[1]
    assert "--gpus" not in found[1]
    assert sum(found[0].memory.values()) < 120 * plan.GIB
    assert plan.search(config, 1, H200)


ALL = "memory.recompute=[linear,softmax,mlp]"
# GiB that PyTorch had given out at most, and seconds: 1.3B models on one NVIDIA H200, torch 2.11,
# triton 3.6, Megatron-Core 0.19.2, `python -m tests.bench.memory` (docs/memory.md)
MEASURED = [
    ("LLLN", "1M", f"{ALL} memory.offload_layers=18 memory.head_groups=4", 85.58, 217.9),
    ("LLLL", "1M", f"{ALL} memory.offload_layers=18", 100.35, 23.70),
    ("LLLL", "1M", f"{ALL} memory.offload_layers=24", 80.33, 23.68),
    ("LLLL", "64K", "memory.recompute=[mlp]", 82.12, 1.394),
]


def measured_step(pattern: str, length: str, words: str) -> plan.Plan:
    given = [f"model.pattern={6 * pattern}", f"data.sequence_length={length}", *words.split()]
    given += ["parallel.context=1", "optimizer.distributed=false", "train.global_batch=1"]
    return plan.make_plan(load_config(HYBRID, given), 1, H200)


@pytest.mark.parametrize(("pattern", "length", "words", "peak", "seconds"), MEASURED)
def test_steps_take_what_was_measured_on_an_h200(
    pattern: str, length: str, words: str, peak: float, seconds: float
) -> None:
    made = measured_step(pattern, length, words)
    allocated = sum(made.memory.values()) - made.memory["reserved"]
    assert allocated / plan.GIB == pytest.approx(peak, rel=0.05)
    assert sum(made.seconds.values()) == pytest.approx(seconds, rel=0.15)


@pytest.mark.complete
@pytest.mark.parametrize(("pattern", "length", "words", "peak", "_"), MEASURED[1:])
def test_hollow_steps_are_as_large_as_those_that_were_measured(
    pattern: str, length: str, words: str, peak: float, _: float
) -> None:
    """The first was measured when sums over groups of heads held one hidden state more."""
    made = measured_step(pattern, length, words)
    [(_, most)] = run_ranks(step_bytes, 1, made.config, made.sizes, "meta", timeout=300)
    held = sum(made.memory[part] for part in ("weights", "gradients", "optimizer"))
    assert (most + held) / plan.GIB == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(("gpus", "seconds"), [(1, 0.991), (2, 1.240)])
def test_steps_take_what_was_measured_on_h100s(gpus: int, seconds: float) -> None:
    """32K tokens a GPU, keys and values gathered: `python -m tests.bench.layer` (performance.md)"""
    spread = [f"parallel.context={gpus}", "parallel.softmax=allgather", "train.global_batch=1"]
    spread += [f"data.sequence_length={32 * gpus}K", "optimizer.distributed=false"]
    made = plan.make_plan(load_config(HYBRID, [*spread, ALL]), gpus, CLUSTERS["h100"])
    assert sum(made.seconds.values()) == pytest.approx(seconds, rel=0.15)


def test_flops_by_part_add_up_to_those_of_the_model() -> None:
    for fields in ({"num_experts": 8}, {"num_experts": 0, "gate_rank": 7, "kv_heads": 2}):
        config = Config()
        config.model = ModelConfig(pattern="GDN", **fields)  # type: ignore[arg-type]
        config.data.sequence_length = 512
        count = Count(config, ALONE)
        total = count.loss_flops
        for mixer in count.mixers:
            total += count.mixer_flops(mixer) + count.mlp_flops
            if mixer == "softmax":
                total += count.attention_flops
            else:
                total += state_flops(count.model, mixer) * count.tokens
        assert 3 * total == pytest.approx(step_flops(config.model, [[0, 512]]), rel=0.02)


def sent(rank: int, exchange: str, layout: str, groups: int) -> int:
    comm = Communicator(torch.distributed.group.WORLD)
    tokens = Layout(64, comm.size, layout)
    sp = SequenceParallel(layout=tokens, exchange=exchange, comm=comm)
    q, k, v = (torch.randn(1, tokens.local_tokens(rank), 4, 16) for _ in range(3))
    decay = torch.nn.functional.logsigmoid(torch.randn(1, tokens.local_tokens(rank), 4, 16))
    for some in zip(*(x.chunk(groups, 2) for x in (q, k, v, decay)), strict=True):
        seqpar.linear_attention(*some, sp=sp)
    return comm.total().bytes_sent


@pytest.mark.parametrize(
    ("layout", "groups"), [("contiguous", 1), ("zigzag", 1), ("contiguous", 2)]
)
@pytest.mark.parametrize("exchange", ["allgather", "ring", "allscan", "doubling", "twolevel"])
def test_bytes_of_an_exchange_are_those_that_are_sent(
    exchange: str, layout: str, groups: int
) -> None:
    config = Config()
    config.model = ModelConfig(pattern="G", num_heads=4, head_dim=16, value_head_dim=16)
    config.parallel.exchange, config.parallel.layout = exchange, layout  # type: ignore[assignment]
    config.memory.recompute, config.memory.head_groups = ["linear"], groups
    _, counted = state_exchange(config, Sizes(4, 1, 1, 1, 1), H200, "gla")
    most = max(run_ranks(sent, 4, exchange, layout, groups))
    assert 0.8 * counted <= most <= counted

"""What a run tells while it trains: speed, memory, profiles, and where numbers break."""

import gzip
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_setup import losses, train_on

from seqpar.launch import flops
from seqpar.launch.failure import UserError
from seqpar.models.config import ModelConfig


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_metrics_of_a_step(config: str, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", "train.steps=2", "optimizer.warmup_steps=0"]
    train_on(2, config, *words)
    for line in metrics(tmp_path / "run"):
        assert line["tokens_per_second"] == 2 * line["tokens_per_second_per_rank"] > 0
        assert 50e6 < line["memory_bytes"] < 50e9
        assert line["seconds_waited"] > 0
        assert line["skipped"] == 0
        assert "mfu" not in line  # of a CPU nobody knows


def test_mfu_where_the_gpu_is_known(config: str, tmp_path: Path) -> None:
    def pretend(rank: int) -> None:
        from seqpar.launch import report

        module: Any = report
        module.peak_of_this_gpu = lambda: 1e12

    words = [f"log.folder={tmp_path}/run", "train.steps=2", "optimizer.warmup_steps=0"]
    text = train_on(1, config, *words, "train.precision=bf16", before=pretend)
    assert " a GPU)  MFU " in text
    for line in metrics(tmp_path / "run"):
        assert 0 < line["mfu"] < 1
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA H20") == 148e12
    assert flops.peak_flops("GeForce 9000") is None


def test_flops_are_those_of_the_matrices_and_pairs() -> None:
    """Against counts by hand: 2 operations a weight and token, the backward pass twice more."""
    model = ModelConfig(
        "N", hidden_size=8, vocab_size=16, num_heads=2, ffn_hidden_size=24, kv_heads=1
    )
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 24 + 8 * 16
    pairs = 10 + 21  # of documents of 4 and 6 tokens
    assert flops.step_flops(model, [[0, 4, 10]]) == 3 * (2 * weights * 10 + 4 * 8 * pairs)
    model = ModelConfig("G", hidden_size=8, vocab_size=16, num_heads=2, ffn_hidden_size=24)
    assert flops.step_flops(model, [[0, 10]]) == 2 * flops.step_flops(model, [[0, 5]])
    model = replace(model, head_dim=4, value_head_dim=6, gate_rank=3)
    rest = 3 * 8 * 24 + 8 * 16
    gla = 8 * (2 * 2 * 4 + 2 * 2 * 6) + 8 * 2 * 6 + 3 * (8 + 2 * 4)
    delta = 8 * (2 * 2 * 4 + 2 * 2 * 6 + 2 * 2) + 8 * 2 * 6
    kimi = 8 * (2 * 2 * 4 + 2 * 6 + 2) + 8 * 2 * 6 + 3 * 2 * (8 + 4 + 6)
    mamba = 8 * (2 * 2 * 4 + 2 * 2 * 6 + 2) + 8 * 2 * 6
    rows = ("G", gla, 4), ("D", delta, 6), ("K", kimi, 6), ("M", mamba, 4)
    for letter, weights, passes in rows:
        found = flops.step_flops(replace(model, pattern=letter), [[0, 10]])
        assert found == 3 * 10 * (2 * (weights + rest) + passes * 2 * 4 * 6), letter


def test_chosen_steps_are_profiled(config: str, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", "train.steps=4", "log.profile_steps=[2,4]"]
    train_on(2, config, *words, "log.profile_ranks=[1]")
    traces = sorted((tmp_path / "run/profile").iterdir())
    assert [path.name for path in traces] == [f"step_{n}_rank_1.json.gz" for n in (2, 4)]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert {"aten::mm", "gloo:all_to_all"} <= {event.get("name") for event in events}


def test_wandb_if_asked(config: str, tmp_path: Path) -> None:
    logged = tmp_path / "logged"

    def pretend(rank: int) -> None:
        class Run:
            def define_metric(self, name: str, step_metric: str) -> None: ...

            def log(self, values: dict[str, float]) -> None:
                with logged.open("a") as file:
                    file.write(json.dumps(values) + "\n")

            def finish(self) -> None: ...

        package: Any = types.ModuleType("wandb")
        package.init = lambda project, id, config, **_: logged.write_text("") or Run()
        sys.modules["wandb"] = package

    words = [f"log.folder={tmp_path}/run", "train.steps=2", "optimizer.warmup_steps=0"]
    train_on(2, config, *words, "log.wandb=mine", before=pretend)
    lines = [json.loads(line) for line in logged.read_text().splitlines()]
    assert [line["trained_steps"] for line in lines if "loss" in line] == [1, 2]
    words[0] += "-2"

    def absent(rank: int) -> None:
        sys.modules["wandb"] = None  # type: ignore[assignment]

    with pytest.raises(UserError, match=r"log\.wandb=mine: .* pip install wandb"):
        train_on(2, config, *words, "log.wandb=mine", before=absent)


def _break(
    where: str, rank: int, layer: int, steps: set[int], value: float
) -> Callable[[int], None]:
    """Multiply the output of a mixer (or its gradient) by `value` on one rank, in some steps."""

    def arrange(here: int) -> None:
        from seqpar.launch import step
        from seqpar.models.mixer import SequenceMixer

        module: Any = step
        train_step, now = module.train_step, [0]

        def counts(*args: Any) -> Any:
            now[0] += 1
            return train_step(*args)

        module.train_step = counts
        owner: Any = SequenceMixer
        forward = owner.forward

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            out, bias = forward(self, *args, **kwargs)
            if here == rank and now[0] in steps and self.number == layer:
                if where == "forward":
                    out = out * value
                else:
                    out.register_hook(lambda g: g * value)
            return out, bias

        init = owner.__init__

        def numbered(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            made[0] += 1
            self.number = made[0]

        made = [0]
        owner.__init__, owner.forward = numbered, broken

    return arrange


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        ("forward", float("nan"), "the output of layer 1, self_attention is NaN on rank 1"),
        ("forward", float("inf"), "the output of layer 1, self_attention is "),
        (
            "backward",
            float("nan"),
            "the gradient at the output of layer 1, self_attention is NaN on rank 1",
        ),
    ],
)
def test_where_a_nan_arose_is_told(
    where: str, value: float, told: str, config: str, tmp_path: Path
) -> None:
    arrange = _break(where, 1, 1, {3}, value)
    with pytest.raises(UserError) as error:
        train_on(2, config, f"log.folder={tmp_path}/run", before=arrange)
    assert str(error.value).startswith("step 3: ")
    assert told in str(error.value)
    assert "on rank 1 (" in str(error.value)


def test_layers_are_numbered_over_all_pipeline_stages(config: str, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", "parallel.pipeline=2", "train.global_batch=2"]
    arrange = _break("forward", 1, 1, {2}, float("nan"))  # the only one of its stage
    with pytest.raises(UserError, match="the output of layer 2, self_attention is NaN on rank 1"):
        train_on(2, config, *words, before=arrange)


def test_a_step_that_breaks_can_be_skipped(config: str, tmp_path: Path) -> None:
    words = [f"log.folder={tmp_path}/run", "train.on_nonfinite=skip", "train.steps=8"]
    text = train_on(2, config, *words, before=_break("forward", 0, 2, {3, 5}, float("nan")))
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert text.count("the output of layer 2, self_attention is NaN on rank 0") == 2
    assert all(loss == loss for step, (loss, *_) in losses(tmp_path / "run").items() if step > 5)
    words = [f"log.folder={tmp_path}/run-2", "train.on_nonfinite=skip"]
    with pytest.raises(UserError, match="step 8: the output of layer 2"):
        train_on(2, config, *words, before=_break("forward", 0, 2, set(range(3, 99)), float("nan")))


def test_weights_that_broke_are_named(config: str, tmp_path: Path) -> None:
    def arrange(rank: int) -> None:
        from seqpar.launch import setup

        made: Any = setup
        build = made.build

        def breaks(*args: Any) -> Any:
            run = build(*args)
            names = dict(run.model[0].named_parameters())
            with torch.no_grad():
                names["module.decoder.layers.1.self_attention.in_proj.weight"][0, 0] = torch.inf
            return run

        made.build = breaks

    with pytest.raises(
        UserError, match=r"parameter layer 2, self_attention\.in_proj\.weight is Inf"
    ):
        train_on(2, config, f"log.folder={tmp_path}/run", before=arrange)


def test_a_full_gpu_leaves_a_snapshot_and_advice(config: str, tmp_path: Path) -> None:
    def arrange(rank: int) -> None:
        from seqpar.launch import step

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        module: Any = step
        if rank == 1:
            module.train_step = full
        memory: Any = torch.cuda.memory
        memory._dump_snapshot = lambda path: Path(path).write_text("snapshot")

    with pytest.raises(AssertionError, match="out of GPU memory: CUDA out of memory") as error:
        train_on(2, config, f"log.folder={tmp_path}/run", before=arrange)
    assert "parallel.context" in str(error.value)
    assert "optimizer.distributed=true" in str(error.value)
    assert (tmp_path / "run/memory_rank_1.pickle").read_text() == "snapshot"

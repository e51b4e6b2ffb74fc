"""Settings: what is understood, what is refused, and with which words."""

from dataclasses import asdict
from pathlib import Path

import pytest

from seqpar.launch.checks import Sizes, check
from seqpar.launch.config import Config, load_config, to_yaml
from seqpar.models.config import layer_mixers, resolved

CONFIGS = Path(__file__).parents[1] / "launch/configs"


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "a.yaml"
    file.write_text("data: {path: corpus, sequence_length: 8K}\nlog: {folder: runs/a}\n")
    return str(file)


def refusal(path: str, *words: str, ranks: int = 1) -> str:
    try:
        check(load_config(path, words), ranks)
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError(f"{words} are accepted")
    assert "\n" not in message
    return message


def test_layers_of_settings(path: str) -> None:
    config = load_config(path, ["train.steps=7", "train.steps=8", "model.hidden_size=32"])
    assert config.data.path == "corpus"  # from the file
    assert (config.train.steps, config.model.hidden_size) == (8, 32)  # from the words, last wins
    assert config.optimizer.beta2 == Config().optimizer.beta2  # by default


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("8K", 8192),
        ("1M", 1048576),
        ("1.5M", 1572864),
        ("0.5K", 512),
        ("1000", 1000),
        ("1_000", 1000),
    ],
)
def test_suffixes_of_whole_numbers(path: str, text: str, tokens: int) -> None:
    assert load_config(path, [f"data.sequence_length={text}"]).data.sequence_length == tokens
    assert load_config(path, [f"parallel.context={text}"]).parallel.context == tokens


def test_values_of_other_kinds(path: str) -> None:
    words = ["optimizer.lr=1e-3", "checkpoint.resume=20", "log.tensorboard=no", "data.held_out=8K"]
    config = load_config(path, words)
    assert config.optimizer.lr == 1e-3
    assert config.checkpoint.resume == "20"
    assert config.log.tensorboard is False
    assert config.data.held_out == "8K"  # a name is a name
    assert load_config(path, ["parallel.context=null"]).parallel.context is None


def test_what_is_saved_reads_back_the_same(path: str, tmp_path: Path) -> None:
    config = load_config(path, ["train.steps=3", "model.pattern=LG DN"])
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "b.yaml")) == config


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("data.sequence_lenght=1", ["data.sequence_lenght is not a setting; did you mean "
                                    "data.sequence_length? data: path, held_out, "]),
        ("sequence_length=1", ["did you mean data.sequence_length?"]),
        ("optimiser.lr=1", ["did you mean optimizer?"]),
        ("train.every=1", ["did you mean checkpoint.every or log.every?"]),
        ("optimizer.steps=1", ["did you mean train.steps?", "optimizer: lr, min_lr"]),
        ("zzz=1", ["zzz is not a setting; settings: train, data, model"]),
        ("train=1", ["train=1 must be a section with the settings steps"]),
        ("data.sequence_length=abc", ["data.sequence_length", "'abc'", "Integer"]),
        ("data.sequence_length=1.0001K", ["data.sequence_length", "'1.0001K'"]),
        ("data.sequence_length=8k", ["data.sequence_length=8k", "did you mean 8K?"]),
        ("train.steps=1e3", ["train.steps=1000.0 must be a whole", "did you mean 1000?"]),
        ("train.precision=bf61", ["must be one of fp32, bf16; did you mean bf16?"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("model.hidden_size=wide", ["model.hidden_size", "'wide'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "Float"]),
        ("parallel.layout=zigzig", ["parallel.layout=zigzig", "did you mean zigzag?"]),
        ("log.tensorboard=maybe", ["log.tensorboard", "'maybe'"]),
        ("log.folder=null", ["log.folder"]),
        ("steps", ["'steps' must have the form section.key=value"]),
        ("train.steps.a=1", ["train.steps"]),
        ("data.path={", ["data.path={", "not valid YAML"]),
    ],
)  # fmt: skip
def test_unknown_and_wrong_words(path: str, word: str, parts: list[str]) -> None:
    message = refusal(path, word)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"train: {steps: 3", ["not valid YAML", "line 1"]),
        (b"\xff\xfe\x00", ["not valid YAML"]),
        (b"- a\n- b\n", ["must be a section"]),
        (b"log: {folder: a}\n", ["data.path is not set", "data.path=VALUE"]),
        (b"data: {path: a}\n", ["log.folder is not set"]),
        (b"data: {pth: a}\n", ["did you mean data.path?"]),
        (b"", ["data.path is not set"]),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, text: bytes, parts: list[str]) -> None:
    (tmp_path / "b.yaml").write_bytes(text)
    message = refusal(str(tmp_path / "b.yaml"))
    for part in parts:
        assert part in message
    assert "cannot be read" in refusal(str(tmp_path / "nowhere.yaml"))
    assert "cannot be read" in refusal(str(tmp_path))
    assert "did you mean launch/configs/demo.yaml?" in refusal("dmo.yaml")


@pytest.mark.parametrize(
    ("ranks", "words", "message"),
    [
        (24, ["data.sequence_length=1000000", "parallel.layout=zigzag"],
         "data.sequence_length=1000000 must be a multiple of 2*cp=48 for layout zigzag; "
         "nearest: 999984, 1000032"),
        (3, [], "data.sequence_length=8192 must be a multiple of cp=3 for layout contiguous; "
                "nearest: 8190, 8193"),
        (4, ["data.sequence_length=7", "parallel.context=4"], "nearest: 4, 8"),
        (4, ["data.sequence_length=6", "parallel.tensor=2"], "multiple of cp*tp=4"),
        (4, ["parallel.context=3"], "parallel.context=3 must divide the 4 ranks that"),
        (4, ["parallel.context=3"], "nearest: 2, 4"),
        (4, ["parallel.context=0"], "parallel.context=0 must divide the 4 ranks"),
        (3, ["parallel.tensor=2"], "must divide the number of ranks=3; nearest number of ranks: "
                                   "2, 4"),
        (4, ["parallel.expert=3"], "parallel.expert=3 must divide the 4 ranks"),
        (4, ["parallel.context=2"], "train.global_batch=1 must be a multiple of the 2 "
                                    "data-parallel ranks; nearest: 2"),
        (1, ["train.steps=0"], "train.steps=0 must be at least 1; nearest: 1"),
        (1, ["optimizer.lr=-1"], "optimizer.lr=-1.0 must be at least 0"),
        (1, ["optimizer.lr=nan"], "optimizer.lr=nan must be at least 0"),
        (1, ["optimizer.min_lr=1"], "optimizer.min_lr=1.0 must not be above optimizer.lr=0.001"),
        (1, ["optimizer.warmup_steps=100"], "must be below train.steps=100; nearest: 99"),
        (1, ["optimizer.beta2=1"], "optimizer.beta2=1.0 must be at least 0 and below 1"),
        (1, ["optimizer.eps=0"], "optimizer.eps=0.0 must be above 0"),
        (4, ["parallel.expert=2", "parallel.expert_tensor=4"], "parallel.expert_tensor=4 must"),
        (
            4,
            [
                "parallel.pipeline=2",
                "parallel.context=1",
                "parallel.stages=[1,1,1,1]",
                "train.global_batch=6",
            ],
            "must be a multiple of 2 data-parallel times 2 pipeline ranks",
        ),
        (1, ["memory.recompute=[linear,mlpp]"], "may hold linear, softmax, mlp"),
        (1, ["parallel.exchange=rign"], "did you mean ring?"),
        (1, ["parallel.softmax=rign"], "did you mean ring?"),
        (1, ["checkpoint.resume=last"], 'must be "latest", "auto" or the step'),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_each_other(
    path: str, ranks: int, words: list[str], message: str
) -> None:
    assert message in refusal(path, *words, ranks=ranks)


@pytest.mark.parametrize(
    ("ranks", "words", "sizes"),
    [
        (1, [], Sizes(1, 1, 1, 1, 1)),
        (8, [], Sizes(8, 1, 1, 1, 1)),
        (8, ["parallel.tensor=2"], Sizes(4, 2, 1, 1, 1)),
        (8, ["parallel.context=2", "train.global_batch=4"], Sizes(2, 1, 1, 1, 4)),
        (
            8,
            ["parallel.pipeline=2", "parallel.expert=4", "model.num_experts=4"],
            Sizes(4, 1, 2, 4, 1),
        ),
    ],
)
def test_sizes(path: str, ranks: int, words: list[str], sizes: Sizes) -> None:
    assert check(load_config(path, words), ranks) == sizes


@pytest.mark.parametrize(("name", "ranks"), [("demo", 2), ("a0.3b-2b", 8)])
def test_shipped_configurations(name: str, ranks: int) -> None:
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    assert check(config, ranks).context == ranks
    assert len(layer_mixers(resolved(config.model))) == {"demo": 4, "a0.3b-2b": 12}[name]


def test_the_published_shape_of_a03b_2b() -> None:
    model = asdict(load_config(str(CONFIGS / "a0.3b-2b.yaml")).model)
    published = {"hidden_size": 1024, "num_heads": 8, "num_experts": 64, "moe_top_k": 8}
    assert model == {**model, **published, "moe_ffn_hidden_size": 896}

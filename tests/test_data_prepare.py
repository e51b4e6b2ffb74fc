"""Text on disk becomes Megatron's indexed format, whole and in order, or a message."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from launch_setup import write_documents
from megatron.core.datasets.indexed_dataset import IndexedDataset

from seqpar.launch.prepare import prepare
from seqpar.launch.tokenizer import ByteTokenizer, load_tokenizer

END = 256


def documents(prefix: Path | str) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts(prefix: Path | str) -> list[str]:
    found = documents(prefix)
    assert all(document[-1] == END and END not in document[:-1] for document in found)
    return [bytes(document[:-1]).decode() for document in found]


def test_files_in_a_folder_in_order_of_their_path(tmp_path: Path) -> None:
    expected = [file.read_text() for file in write_documents(tmp_path / "in/b")]
    (tmp_path / "in/a").mkdir()
    (tmp_path / "in/a/z.txt").write_text("Grüße")
    (tmp_path / "in/a/z.md").write_text("not this")
    found = prepare([tmp_path / "in"], str(tmp_path / "new/out"), glob="*.txt")
    assert texts(tmp_path / "new/out") == ["Grüße", *expected]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "out.bin",
        "out.idx",
        "out.json",
    ]
    counts = Counter(token for document in documents(tmp_path / "new/out") for token in document)
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert found[0].unigram_entropy == pytest.approx(entropy, rel=1e-12)
    assert (found[0].tokens, found[0].documents) == (total, 41)
    stored = json.loads((tmp_path / "new/out.json").read_text())
    assert stored["tokenizer"] == "byte"
    assert (stored["vocab_size"], stored["end_of_document"]) == (257, 256)


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [{"text": "one\u2028still one", "id": 1}, {"text": "two"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    prepare([path], f"{tmp_path}/out")
    assert texts(tmp_path / "out") == ["one\u2028still one", "two"]


def test_the_held_out_part_depends_on_the_text_alone(tmp_path: Path) -> None:
    files = write_documents(tmp_path / "in", count=200)
    copy = tmp_path / "in/copy.txt"
    copy.write_text(files[0].read_text())
    prepare(files, f"{tmp_path}/a", held_out=0.25)
    prepare([copy, *reversed(files)], f"{tmp_path}/b", held_out=0.25)
    train, held_out = texts(tmp_path / "a"), texts(tmp_path / "a.held_out")
    assert sorted(train + held_out) == sorted(file.read_text() for file in files)
    assert not set(train) & set(held_out)
    assert 25 < len(held_out) < 75
    assert set(texts(tmp_path / "b.held_out")) == set(held_out)
    assert set(texts(tmp_path / "b")) == set(train)


def word_tokenizer(path: Path, end: str) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({"?": 0, "state": 1, "scan": 7}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([end])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.save(str(path))
    return path


def test_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    path = word_tokenizer(tmp_path / "tokenizer.json", "</s>")
    tokenizer = load_tokenizer(str(path))
    (tmp_path / "a.txt").write_text("scan state scan")
    found = prepare([tmp_path / "a.txt"], f"{tmp_path}/out", tokenizer=str(path))
    end = tokenizer.end_of_document
    assert documents(tmp_path / "out") == [[7, 1, 7, end]]  # no token before, one after
    assert found[0].vocab_size == tokenizer.vocab_size == 8
    assert tokenizer.decode(np.array([7, 1, end])) == "scan state"
    assert load_tokenizer(str(tmp_path)).name == str(path)  # its folder will do


def test_bytes_come_back() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(np.append(tokenizer.encode("Grüße\n"), END)) == "Grüße\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, 'must be "byte" or the path of a Hugging Face tokenizer.json'),
        ("{", "not a readable tokenizer.json"),
        ("[STOP]", r"no token for the end of a document; its vocabulary must have one of <\|end"),
    ],
)
def test_tokenizers_that_do_not_do(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content == "[STOP]":
        word_tokenizer(path, content)
    elif content is not None:
        path.write_text(content)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / "a.txt"], f"{tmp_path}/out", tokenizer=str(path))
    assert not (tmp_path / "out.bin").exists()


def test_what_is_no_text_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in {
        "a": b"good",
        "b": b"",
        "c": b"ab\xff",
        "d.jsonl": b'{"text": ""}\n{"text": "\xff"}\n{"text": "line"}',
    }.items():
        (tmp_path / name).write_bytes(content)  # fmt: skip
    prepare([tmp_path], f"{tmp_path}/out/x")
    assert texts(tmp_path / "out/x") == ["good", "line"]
    assert [record.getMessage() for record in caplog.records] == [
        f"left out {tmp_path}/b: empty",
        f"left out {tmp_path}/c: not UTF-8 text (byte 2)",
        f"left out {tmp_path}/d.jsonl:1: empty",
        f"left out {tmp_path}/d.jsonl:2: not UTF-8 text (byte 10)",
    ]


WRONG: list[tuple[str, bytes | None, dict[str, object], str]] = [
    ("a.txt", None, {}, r"input .*a\.txt: no such file or folder"),
    ("a.txt", b"", {}, r"empty corpus: none of 0 documents"),
    ("a.txt", b"text", {"held_out": 1.0}, r"held-out=1\.0 must be at least 0 and below 1"),
    ("a.txt", b"text", {"held_out": 1e-9}, r"none of 1 documents is in the held-out part"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ', {}, r"a\.jsonl:2: not JSON .*column 10"),
    ("a.jsonl", b'{"txt": "a"}', {}, r'a\.jsonl:1: must be an object whose field "text"'),
    ("a.jsonl", b"3", {}, r'a\.jsonl:1: must be an object whose field "text"'),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), WRONG)
def test_nothing_is_left_behind(
    name: str,
    content: bytes | None,
    options: dict[str, object],
    message: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / name], f"{tmp_path}/out/x", **options)  # type: ignore[arg-type]
    assert not list((tmp_path / "out").iterdir())


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file in this folder matches --glob '\*\.py'"):
        prepare([tmp_path / "empty"], f"{tmp_path}/out", glob="*.py")
    with pytest.raises(ValueError, match=r"input /proc/self/mem: cannot be read"):
        prepare([Path("/proc/self/mem")], f"{tmp_path}/out")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"output=/proc/x/out: cannot write to /proc/x"):
        prepare([tmp_path / "a.txt"], "/proc/x/out")


@pytest.mark.parametrize("name", ["x.bin", "x.idx", "x.held_out.json"])
def test_nothing_is_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=rf"{name} exists; choose another prefix"):
        prepare([tmp_path / "a.txt"], f"{tmp_path}/x", held_out=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.txt", name])
    assert (tmp_path / name).read_text() == "precious"


def test_the_command(tmp_path: Path) -> None:
    write_documents(tmp_path / "in")
    command = [sys.executable, "-m", "seqpar.launch.prepare", str(tmp_path / "in")]
    command += ["--output", f"{tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 documents" in done.stdout
    assert "unigram entropy" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: output={tmp_path}/out: ")
    assert len(again.stderr.splitlines()) == 1

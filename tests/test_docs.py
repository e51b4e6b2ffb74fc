"""The documentation is true: its examples run, and what it points at exists.

The ```python blocks of a page run in order, in one namespace, so that a later block may continue
an earlier one. A block that needs several ranks says so: ```python ranks=2 runs on two, with the
default process group set up, in a namespace that starts as the page's.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: the words after its fence, its text, and the line where that begins."""

    words: list[str]
    text: str
    line: int

    @property
    def ranks(self) -> int | None:
        """How many ranks the block asks for; None: it runs in the page's own process."""
        marks = " ".join(self.words[1:])
        if not marks:
            return None
        match = re.fullmatch(r"ranks=(\d+)", marks)
        assert match, f"line {self.line}: `{marks}` is unknown; it may be ranks=N"
        return int(match[1])

    def run(self, page: str, namespace: dict[str, Any]) -> None:
        # The empty lines make a traceback give the line of the page.
        exec(compile("\n" * (self.line - 1) + self.text, page, "exec"), namespace)


def blocks(text: str) -> list[Block]:
    return [
        Block(match[2].split(), match[3], text[: match.start(3)].count("\n") + 1)
        for match in FENCE.finditer(text)
    ]


def run_page(page: str, text: str) -> None:
    namespace: dict[str, Any] = {"__name__": page}
    for block in blocks(text):
        if block.words[:1] != ["python"]:
            continue
        if block.ranks is None:
            block.run(page, namespace)
        else:
            run_ranks(lambda rank, block=block: block.run(page, dict(namespace)), block.ranks)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def broken_links(page: Path) -> list[str]:
    text = prose(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="(.*?)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def missing_files(text: str, root: Path) -> list[str]:
    """Paths below the repository's folders that a page names, in prose or commands, and are not."""
    folders = "seqpar|kernels|models|launch|tests|docs"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w)", text)
    run_as_modules = re.findall(r"-m (seqpar[\w.]*)", text)
    named += [name.replace(".", "/") + ".py" for name in run_as_modules]
    return sorted({name for name in named if not (root / name).exists()})


def missing_targets(text: str, makefile: str) -> list[str]:
    return [
        target
        for target in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, re.MULTILINE)
        if not re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str) -> None:
    run_page(page, (ROOT / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert broken_links(ROOT / page) == []
    assert missing_files(text, ROOT) == []
    assert missing_targets(text, (ROOT / "Makefile").read_text()) == []


# In halves, for this file is read as well.
FORBIDDEN = ["/wo" + "rk/", "pypi" + ".org", "python" + "hosted", "npm" + "js"]


def forbidden_words(files: list[Path]) -> list[str]:
    """What belongs to one machine or registry has no place in the project."""
    found = []
    for file in files:
        text = file.read_bytes().decode(errors="replace").lower()
        found += [f"{file}: {word}" for word in FORBIDDEN if word in text]
    return found


def test_no_file_names_a_machine_or_a_registry() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists():
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        names = output.decode().strip("\0").split("\0")
    else:
        names = PAGES
    files = [ROOT / name for name in names]
    assert forbidden_words([file for file in files if file.is_file()]) == []


# The same checks on a page with a fault each.

PAGE = """# A page

Some text, see [the other](other.md#two-words) and [here](#a-page).

```python
x = 1
```

```sh
make demo
```

```python
x += 1
assert x == 2
```

```python ranks=2
import torch.distributed as dist
assert dist.get_world_size() == x
```
"""


def test_a_page_without_fault_passes(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "other.md").write_text("## Two words!\n")
    run_page("page.md", PAGE)
    assert broken_links(tmp_path / "page.md") == []
    assert missing_targets(PAGE, "demo: install\n") == []


def test_a_failing_example_gives_the_line_of_the_page() -> None:
    with pytest.raises(AssertionError) as failure:
        run_page("page.md", PAGE.replace("x == 2", "x == 3"))
    assert failure.traceback[-1].lineno + 1 == PAGE.splitlines().index("assert x == 2") + 1


@pytest.mark.parametrize(("right", "wrong"), [("size() == x", "size() == 3"), ("ranks=2", "gpu")])
def test_a_failing_or_unknown_kind_of_example_is_found(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        run_page("page.md", PAGE.replace(right, wrong))


def test_what_a_page_names_in_vain_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE + "[gone](gone.md) ![image](x.png) [no](#nowhere)\n")
    (tmp_path / "other.md").write_text("## Another\n")
    broken = ["other.md#two-words", "gone.md", "x.png", "#nowhere"]
    assert broken_links(tmp_path / "page.md") == broken
    text = "`seqpar/gone.py` tests/test_docs.py\n-m seqpar.launch.gone launch/configs/no.yaml"
    gone = ["launch/configs/no.yaml", "seqpar/gone.py", "seqpar/launch/gone.py"]
    assert missing_files(text, ROOT) == gone
    assert len(missing_targets(PAGE, "test:\n")) == 1
    (tmp_path / "page.md").write_text(f"cd {FORBIDDEN[0]}main")
    assert len(forbidden_words([tmp_path / "page.md"])) == 1

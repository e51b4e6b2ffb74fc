"""Text to token ids: one token a byte, or any Hugging Face `tokenizer.json`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# What published tokenizers call the token after which a new document begins, most common first.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOT>",
)


class ByteTokenizer:
    """The 256 bytes of UTF-8, and id 256 for the end of a document. Ids lie in [0, vocab_size)."""

    name = "byte"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: NDArray[np.integer]) -> str:
        """Text of `ids` without ends of documents; a character cut in the middle becomes U+FFFD."""
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`; its end-of-text token ends a document."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError(f"tokenizer={path}: not a readable tokenizer.json ({error})") from None
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        known = [name for name in END_OF_DOCUMENT_NAMES if name in vocabulary]
        if not known:
            raise ValueError(
                f"tokenizer={path}: no token for the end of a document; its vocabulary must have "
                f"one of {', '.join(END_OF_DOCUMENT_NAMES)} (add one to added_tokens in the file)"
            )
        self.name = str(path)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.end_of_document = vocabulary[known[0]]

    def encode(self, text: str) -> NDArray[np.int64]:
        # Special tokens would come with every document; the only one wanted is its end.
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: NDArray[np.integer]) -> str:
        """Text of `ids` without special tokens."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)


Tokenizer = ByteTokenizer | FileTokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", or the path of a `tokenizer.json`.

    Raises ValueError when `name` is neither, or the file has no token for the end of a document.
    """
    if name == "byte":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f'tokenizer={name}: must be "byte" or the path of a Hugging Face tokenizer.json; '
            f"{path} is not a file"
        )
    return FileTokenizer(path)

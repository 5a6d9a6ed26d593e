"""Where the text of the prefixes comes from: a file, JSON lines, a ``datasets`` source, or CPython itself."""

import json
import os
from pathlib import Path

from dtm_fast.errors import ProbeError
from dtm_fast.model.soundness import first_line

DEFAULT_SOURCE = "pydoc"
_DATASETS = "datasets:"


def read_documents(source: str = DEFAULT_SOURCE, limit: int = 100_000) -> list[str]:
    """The documents of ``source``, each a string that is not empty.

    Args:
        source: ``"pydoc"`` for the English text that every CPython ships (``pydoc_data.topics``, the language
            reference); a text file (one document); a ``.jsonl`` file (one document a line: a string, or an
            object with a ``text``, ``prompt`` or ``content`` string); or
            ``"datasets:NAME[:CONFIG[:SPLIT]]"`` for a Hugging Face data set with such a column, streamed.
        limit: the most documents to read, at least 1.

    Raises:
        ProbeError: if limit is below that, or there is nothing to read there, or text that UTF-8 cannot encode.
    """
    if limit < 1:
        raise ProbeError(f"limit must be at least 1, not {limit}")
    if source == DEFAULT_SOURCE:
        from pydoc_data.topics import topics

        documents = [topics[name] for name in sorted(topics)]
    elif source.startswith(_DATASETS):
        documents = _from_datasets(source.removeprefix(_DATASETS), limit)
    else:
        documents = _from_file(Path(os.path.expanduser(source)))
    documents = [document for document in documents[:limit] if document.strip()]
    if not documents:
        raise ProbeError(f"{source}: holds no text")
    return documents


def _from_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is not text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ProbeError(f"{path}: cannot be read as text: {reason}") from error
    if path.suffix not in (".jsonl", ".ndjson"):
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                document = _text_of(json.loads(line))
            except (ValueError, RecursionError, ProbeError):  # JSON of 5,000 digits, or as deep
                raise ProbeError(
                    f"{path}, line {number}: neither a JSON string nor an object with text, prompt or content"
                ) from None
            _check_characters(document, f"{path}, line {number}")
            documents.append(document)
    return documents


def _from_datasets(spec: str, limit: int) -> list[str]:
    name, config, split = (*spec.split(":"), "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError:
        raise ProbeError(f"datasets:{spec}: needs: pip install 'dtm-fast[datasets]'") from None
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        return [_text_of(row) for row in rows.take(limit)]
    except ProbeError:
        raise ProbeError(f"datasets:{spec}: its rows have no text, prompt or content column") from None
    except Exception as error:
        raise ProbeError(f"datasets:{spec}: cannot be loaded: {first_line(error)}") from error


def _check_characters(document: str, where: str) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer reads."""
    try:
        document.encode()
    except UnicodeEncodeError as error:
        half = ord(document[error.start])
        raise ProbeError(f"{where}: not UTF-8 text: \\u{half:04x} is half of a surrogate pair") from None


def _text_of(row: object) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key in ("text", "prompt", "content"):
            if isinstance(row.get(key), str):
                return str(row[key])
    raise ProbeError("no text in this row")

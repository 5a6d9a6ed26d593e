import sys
from types import SimpleNamespace

import pytest

from dtm_fast import read_documents
from dtm_fast.errors import ProbeError

pytestmark = pytest.mark.once


def test_pydoc_is_the_default_and_long_english():
    documents = read_documents()
    assert documents == read_documents("pydoc")
    assert sum(map(len, documents)) > 300_000
    assert any(document.startswith('The "assert" statement') for document in documents)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")) == ["one\n\ntwo é\n"]


def test_json_lines_may_be_strings_and_objects(tmp_path):
    lines = ['"one"', '{"text": "two"}', "", '{"prompt": "three", "id": 3}', '{"content": "four"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_documents(str(tmp_path / "a.jsonl")) == ["one", "two", "three", "four"]


def test_text_stands_before_prompt_and_content(tmp_path):
    (tmp_path / "a.ndjson").write_text('{"content": "c", "prompt": "p", "text": "t"}')
    assert read_documents(str(tmp_path / "a.ndjson")) == ["t"]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one\u2028still\x85one"\r\n"two"\r\n', encoding="utf-8", newline="")
    assert read_documents(str(tmp_path / "a.jsonl")) == ["one\u2028still\x85one", "two"]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '"one"'), ("a.txt", "one")])
def test_a_byte_order_mark_is_not_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_documents(str(tmp_path / name)) == ["one"]


@pytest.mark.parametrize(
    "bad",
    ["{", "3", "null", '{"text": 3}', '{"words": "x"}', '["x"]', "plain", "1" * 6000, "[" * 200_000],
    ids=lambda bad: bad[:16],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(f'"one"\n\n{bad}\n"four"\n')
    with pytest.raises(ProbeError, match=r"a\.jsonl, line 3: neither a JSON string nor an object with text"):
        read_documents(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("bad", [r'"\ud800"', r'{"text": "a \uDCFF b"}', r'"\udc00\ud800"'])
def test_half_of_a_surrogate_pair_is_named_by_its_line(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(f'"one"\n\n{bad}\n"four"\n')
    with pytest.raises(
        ProbeError, match=r"a\.jsonl, line 3: not UTF-8 text: \\ud[8c][0f][0f] is half of a surr"
    ):
        read_documents(str(tmp_path / "a.jsonl"))


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'"\ud83d\ude00"')
    assert read_documents(str(tmp_path / "a.jsonl")) == ["\U0001f600"]


def test_blank_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n" \\n"\n""\n"two"')
    assert read_documents(str(tmp_path / "a.jsonl")) == ["one", "two"]


def test_the_limit_counts_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n"three"')
    assert read_documents(str(tmp_path / "a.jsonl"), limit=2) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "cannot be read as text: No such file or directory"),
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n \n", "holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "cannot be read as text: not UTF-8 text"),
    ],
)
def test_a_file_that_holds_no_text_is_named(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ProbeError, match=rf"{name}: {problem}"):
        read_documents(str(tmp_path / name))


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ProbeError, match="cannot be read as text: Is a directory"):
        read_documents(str(tmp_path))


def test_datasets_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ProbeError, match=r"datasets:c4: needs: pip install 'dtm-fast\[datasets\]'"):
        read_documents("datasets:c4")


def datasets_that(monkeypatch, load) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("datasets:c4", ("c4", None, "train")),
        ("datasets:c4:en", ("c4", "en", "train")),
        ("datasets:c4:en:test", ("c4", "en", "test")),
        ("datasets:c4::test", ("c4", None, "test")),
    ],
)
def test_a_data_set_is_streamed(monkeypatch, source, asked):
    def load(name, config, *, split, streaming):
        assert (name, config, split) == asked
        assert streaming
        return SimpleNamespace(take=lambda limit: [{"text": str(i)} for i in range(5)][:limit])

    datasets_that(monkeypatch, load)
    assert read_documents(source, limit=2) == ["0", "1"]


def test_a_data_set_without_text_is_named(monkeypatch):
    rows = SimpleNamespace(take=lambda limit: [{"label": 1}])
    datasets_that(monkeypatch, lambda *_, **__: rows)
    with pytest.raises(ProbeError, match="datasets:x: its rows have no text, prompt or content column"):
        read_documents("datasets:x")


@pytest.mark.parametrize("message", ["no such\nthing", ""])
def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch, message):
    def load(*_, **__):
        raise OSError(message)

    datasets_that(monkeypatch, load)
    with pytest.raises(ProbeError, match=r"datasets:x: cannot be loaded: (no such|OSError)$"):
        read_documents("datasets:x")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_documents_is_refused(limit):
    with pytest.raises(ProbeError, match=f"limit must be at least 1, not {limit}"):
        read_documents(limit=limit)

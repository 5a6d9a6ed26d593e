"""Folders that several processes write: each is whole, of one of them, and the others say that they were late."""

import subprocess
import sys
from pathlib import Path

import pytest

from dtm_fast.compression.checkpoints import write_folder
from dtm_fast.errors import RunError

pytestmark = pytest.mark.once


def write(content: str):
    return lambda folder: (folder / "content").write_text(content)


def test_of_two_at_once_the_first_to_end_has_written_it(tmp_path):
    folder = tmp_path / "folder [1]"

    def overtaken(unfinished: Path) -> None:
        (unfinished / "content").write_text("late")
        write_folder(folder, write("early"))
        assert (unfinished / "content").read_text() == "late"  # the other has not cleared it away

    with pytest.raises(RunError, match=r"folder \[1\]: cannot be written: .*not empty"):
        write_folder(folder, overtaken)
    assert (folder / "content").read_text() == "early"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_process_that_died_has_left_is_cleared(tmp_path):
    for name in (".unfinished-folder", ".unfinished-folder-0123abcd", ".unfinished-folder-2-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    write_folder(tmp_path / "folder", write("whole"))
    assert {each.name for each in tmp_path.iterdir()} == {"folder", ".unfinished-folder-2-0123abcd"}


@pytest.mark.process
def test_a_process_that_lives_is_left_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dtm_fast.compression.checkpoints import write_folder\n"
        "def wait(folder):\n    print('writes', flush=True); sys.stdin.read(); (folder / 'content').touch()\n"
        "write_folder(Path(sys.argv[1]), wait)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "folder")]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"writes\n"
        write_folder(tmp_path / "folder", write("early"))
        assert len(list(tmp_path.glob(".unfinished-folder-*"))) == 1
        _, said = other.communicate(timeout=60)
    assert b"not empty" in said.lower()
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert (tmp_path / "folder" / "content").read_text() == "early"

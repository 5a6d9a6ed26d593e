"""What importing the package costs, and that all of its names are there."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dtm_fast as dtm

pytestmark = [pytest.mark.process, pytest.mark.once]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_every_public_name_is_there():
    assert [name for name in dtm.__all__ if not hasattr(dtm, name)] == []
    assert set(dtm.__all__) <= set(dir(dtm))


def test_another_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'dtm_fast' has no attribute 'Int16'"):
        dtm.Int16  # noqa: B018


def test_packages_are_there_without_being_imported():
    ended = run("import dtm_fast; print(dtm_fast.plan.Plan.__name__, dtm_fast.nn.Int8Linear.__name__)")
    assert (ended.stdout, ended.stderr) == ("Plan Int8Linear\n", "")


def test_who_wants_the_operations_does_not_wait_for_transformers_or_the_compiler():
    ended = run(
        "import sys; from dtm_fast import nn, ops; print({'transformers', 'torch._dynamo'} & set(sys.modules))"
    )
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["--version"], ["doctor"]])
def test_who_asks_the_command_line_for_help_does_not_wait_for_transformers_or_the_compiler(arguments):
    ended = run(
        f"""
import sys
from pathlib import Path
from dtm_fast.__main__ import main

sys.argv = ["dtm-fast", *{arguments}]
try:
    main()
finally:
    print({{"transformers", "huggingface_hub", "torch._dynamo"}} & set(sys.modules), file=sys.stderr)
"""
    )
    assert (ended.returncode, ended.stderr) == (0, "set()\n")


def test_transformers_is_quiet_in_a_command_that_imports_it():
    ended = run(
        """
import sys
from pathlib import Path
from contextlib import suppress
from dtm_fast.cli import main

sys.argv = ["dtm-fast", "--version"]
with suppress(SystemExit):
    main()

from huggingface_hub.utils import are_progress_bars_disabled, logging as of_the_hub
from transformers.utils import logging

levels = logging.get_verbosity() == logging.ERROR, of_the_hub.get_verbosity() == of_the_hub.ERROR
print(levels, logging.is_progress_bar_enabled(), are_progress_bars_disabled())
"""
    )
    assert (ended.stdout.splitlines()[1:], ended.stderr) == (["(True, True) False True"], "")


def test_an_interrupt_while_the_command_line_is_imported_is_no_traceback():
    ended = run(
        """
import sys
from pathlib import Path
from dtm_fast.__main__ import main

class Interrupts:
    def find_spec(self, name, *_):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
main()
"""
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_a_room_imports_only_from_those_above_it_in_the_list_of_architecture_md():
    root = Path(__file__).resolve().parent.parent
    listed = re.findall(r"^\| `dtm_fast/(\w+)`", (root / "docs/architecture.md").read_text(), re.MULTILINE)
    assert set(listed) == {path.parent.name for path in (root / "dtm_fast").glob("*/__init__.py")}
    known = {"ops": {*listed[: listed.index("ops")], "triton_kernels"}, "triton_kernels": {"ops"}}
    known |= {room: set(listed[:place]) for place, room in enumerate(listed) if room not in known}
    known["cli"].add("console")
    for room in listed:
        for file in (root / "dtm_fast" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    module = node.module or ""
                    names = (
                        [f"dtm_fast.{each.name}" for each in node.names] if module == "dtm_fast" else [module]
                    )
                rooms = {name.split(".")[1] for name in names if name.startswith("dtm_fast.")}
                assert rooms <= known[room] | {room, "errors", "cache", "version"}, f"{file}: {rooms}"

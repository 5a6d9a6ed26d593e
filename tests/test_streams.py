"""Commands whose output goes nowhere: no traceback, and exit code 1 only where a check failed."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.once, pytest.mark.process]

DTM_FAST = (sys.executable, "-m", "dtm_fast")


def ended(arguments: str, streams: str) -> subprocess.CompletedProcess[str]:
    command = f"{' '.join(DTM_FAST)} {arguments} {streams}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


def test_without_a_standard_output_a_command_does_its_work():
    found = ended("doctor", ">&-")
    assert (found.returncode, found.stderr) == (0, "")


def test_an_error_that_cannot_be_said_is_still_one():
    assert ended("report /no/such/run", "2>/dev/full").returncode == 2
    assert ended("report /no/such/run", "2>&-").returncode == 2


def test_who_reads_no_further_is_not_told_that_a_check_failed():
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [*DTM_FAST, "doctor"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")

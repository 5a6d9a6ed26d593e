import json

import tiny
import torch

from benchmarks import generation


@torch.no_grad()
def test_every_row_is_checked_timed_and_told() -> None:
    prompt = torch.arange(3, 19)[None]
    result = generation.compare(tiny.model_of(), prompt, written=4, rounds=1, at_least=0.001)
    assert list(result["rows"]) == list(generation.TREATMENTS)
    for name, row in result["rows"].items():
        assert row["reading"]["ratio"] > 0
        assert row["writing"]["median_s"] > 0
        if name != "all w8a8":  # these stay torch's own layers, so small are they
            assert row["equal_to_treated"] == row["equal_to_treated_at_first"] == 5
    assert result["rows"]["no plan"]["equal_to_base"] == 5
    about = {"cpu_model": "A CPU", "threads": 2, "date": "2026-01-01", "git_sha": "abc", "torch": "2"}
    report = json.loads(
        json.dumps({"machine": about, "quick": True, "results": {"float32": result}})
    )  # the page is made of what the file holds
    page = generation.page(report, "file.json")
    assert "`benchmarks/results/file.json`: A CPU, 2 threads" in page
    assert "| float32, all w8a8 | 21 Int8Linear | " in page
    assert " 5 of 5, the first 5 | 5 of 5 |" in page
    assert "A quick run" in page


def test_a_text_is_written_again_the_same() -> None:
    with torch.no_grad():
        writer = generation.Writer(tiny.model_of("gpt2"), torch.arange(3, 19)[None], 6)
        text = writer.write()
        assert torch.equal(writer.write(), text)
    assert len(text) == 7


def test_equal_tokens_are_counted_up_to_the_first_difference() -> None:
    a, b = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 0, 8])
    assert [generation.equal_at_first(a, each) for each in (a, b)] == [4, 2]

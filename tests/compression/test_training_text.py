import warnings

import pytest
import tiny
import torch

from dtm_fast.compression.training_text import blocks_of
from dtm_fast.errors import InputError


def texts_of(tokenizer, blocks: torch.Tensor) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(row)) for row in blocks.tolist()]


def test_documents_follow_one_another_each_with_its_end():
    tokenizer = tiny.tokenizer_of_characters()
    blocks = blocks_of(tokenizer, ["abc", "defgh", "ijklm"], 5, 3)
    assert blocks.dtype == torch.int64
    assert texts_of(tokenizer, blocks) == ["abc</s>d", "efgh</s>", "ijklm"]


def test_one_document_may_be_given_alone():
    tokenizer = tiny.tokenizer_of_characters()
    assert texts_of(tokenizer, blocks_of(tokenizer, "abcdefg", 4, 2)) == ["abcd", "efg</s>"]


def test_a_frame_that_the_tokenizer_makes_is_kept_and_not_made_twice():
    tokenizer = tiny.tokenizer_of_characters(start=True, end=True)
    assert texts_of(tokenizer, blocks_of(tokenizer, ["ab", "cd"], 4, 2)) == ["<s>ab</s>", "<s>cd</s>"]


def test_without_a_token_that_ends_a_text_none_stands_between():
    tokenizer = tiny.tokenizer_of_characters()
    tokenizer.eos_token = None
    assert texts_of(tokenizer, blocks_of(tokenizer, ["abc", "def"], 3, 2)) == ["abc", "def"]


def test_skipped_documents_are_in_no_block():
    tokenizer = tiny.tokenizer_of_characters()
    blocks = blocks_of(tokenizer, ["aaaa", "bbbb", "cccc", "dddd"], 5, 2, skip=2)
    assert texts_of(tokenizer, blocks) == ["cccc</s>", "dddd</s>"]


def test_a_stream_is_read_no_further_than_needed():
    read = []

    def stream():
        for number in range(100):
            read.append(number)
            yield "abcd"

    blocks = blocks_of(tiny.tokenizer_of_characters(), stream(), 10, 2, skip=3)
    assert blocks.shape == (2, 10)
    assert read == list(range(7))  # three skipped, four of five tokens each


def test_the_same_text_gives_the_same_blocks_and_a_higher_count_more_of_them():
    tokenizer, text = tiny.tokenizer_of_characters(), [tiny.text_of(50, seed) for seed in range(10)]
    few, many = blocks_of(tokenizer, text, 16, 5), blocks_of(tokenizer, text, 16, 20)
    assert torch.equal(few, many[:5])
    assert len(many) == 20


def test_fewer_blocks_than_wanted_are_a_warning():
    with pytest.warns(UserWarning, match="the text has 2 blocks of 4 tokens, not 9"):
        blocks = blocks_of(tiny.tokenizer_of_characters(), ["abcdefghi"], 4, 9)
    assert blocks.shape == (2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(blocks_of(tiny.tokenizer_of_characters(), ["abcdefghi"], 4, 2)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["abc"], 8, 1), "the text is shorter than one block: 4 tokens, a block has 8"),
        (
            (["abc" * 9, "d"], 8, 1, 1),
            "the text after the first 1 documents is shorter than one block: 2 tokens, a block has 8",
        ),
        (([], 8, 1), "the text is shorter than one block: 0 tokens, a block has 8"),
        ((["abc"], 0, 1), "length must be a whole number of at least 1, not 0"),
        ((["abc"], 2, 1.0), "count must be a whole number of at least 1, not 1.0"),
        ((["abc"], 2, 1, -1), "skip must be a whole number of at least 0, not -1"),
    ],
)
def test_what_gives_no_block_is_said_in_one_line(arguments, said):
    with pytest.raises(InputError) as error:
        blocks_of(tiny.tokenizer_of_characters(), *arguments)
    assert str(error.value) == said

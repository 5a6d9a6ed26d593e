import warnings

import pytest
import tiny
import torch
from safetensors.torch import save_file

from dtm_fast import Probes
from dtm_fast.errors import ModelError, ProbeError
from dtm_fast.measure.forward import logits_before

pytestmark = pytest.mark.once

TOKENIZER = tiny.tokenizer_of_characters()


def probes_of(model, text, prefix=4, completion=5, count=3, tokenizer=TOKENIZER, **options) -> Probes:
    return Probes.from_text(model, tokenizer, text, prefix, completion, count, **{"cache": False, **options})


def prefixes(probes: Probes) -> list[str]:
    rows = probes.tokens[:, : probes.prefix].tolist()
    return ["".join(TOKENIZER.convert_ids_to_tokens(row)) for row in rows]


def test_prefixes_are_cut_from_the_text(llama):
    assert prefixes(probes_of(llama, "abcdefghijkl")) == ["abcd", "efgh", "ijkl"]


def test_a_prefix_never_spans_two_documents(llama):
    documents = ["abcdefg", "hi", "jklm", "nopqrstu"]
    assert prefixes(probes_of(llama, documents, count=4)) == ["abcd", "jklm", "nopq", "rstu"]


def test_fewer_probes_are_spread_evenly_from_first_to_last(llama):
    text = "".join(4 * chr(97 + i) for i in range(21))
    assert prefixes(probes_of(llama, text, count=5)) == ["aaaa", "ffff", "kkkk", "pppp", "uuuu"]


@pytest.mark.parametrize("count", range(1, 31))
def test_no_prefix_is_taken_twice(llama, count):
    text = "".join(chr(33 + i) for i in range(60))
    assert len(set(prefixes(probes_of(llama, text, prefix=2, completion=1, count=count)))) == count


def test_other_probes_are_of_what_is_left(llama):
    text = "".join(4 * chr(97 + i) for i in range(21))
    first = probes_of(llama, text, count=5)
    assert prefixes(probes_of(llama, text, count=4, other_than=first)) == ["bbbb", "hhhh", "nnnn", "tttt"]
    with pytest.warns(UserWarning, match="the text has 16 prefixes"):
        rest = probes_of(llama, text, count=64, other_than=first)
    assert sorted(prefixes(rest) + prefixes(first)) == [4 * chr(97 + i) for i in range(21)]


def test_a_text_without_others_has_none(llama):
    every = probes_of(llama, "abcdefghijkl")
    with pytest.raises(
        ProbeError, match="the text has no other prefixes of 4 tokens than the 3 of other_than"
    ):
        probes_of(llama, "abcdefghijkl", other_than=every)
    with pytest.raises(ProbeError, match="other_than: its prefixes have 4 tokens, not 3"):
        probes_of(llama, "abcdefghijkl", prefix=3, other_than=every)


def test_a_text_with_fewer_prefixes_gives_all_with_a_warning(llama):
    with pytest.warns(UserWarning, match="the text has 3 prefixes of 4 tokens, not 64"):
        assert len(probes_of(llama, "abcdefghijkl", count=64)) == 3


def test_completion_margins_and_choices_are_those_of_the_base(family):
    model = tiny.model_of(family)
    probes = probes_of(model, tiny.text_of(99), 8, 10)
    with torch.no_grad():
        logits = model(probes.tokens).logits.float()
    top = logits.topk(2).values
    assert torch.equal(probes.tokens[:, 8:], logits[:, 7:-1].argmax(-1))
    torch.testing.assert_close(probes.margins, (top[..., 0] - top[..., 1])[:, 7:-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(probes.prefix_choices, logits[:, :7].argmax(-1))


def test_what_is_kept_is_small_and_of_one_kind(llama):
    probes = probes_of(llama, tiny.text_of(99), 8, 10)
    kinds = {n: (getattr(probes, n).dtype, tuple(getattr(probes, n).shape)) for n in vars(probes) if n[0] != "_"
             and isinstance(getattr(probes, n), torch.Tensor)}  # fmt: skip
    assert kinds == {
        "tokens": (torch.int64, (3, 18)),
        "margins": (torch.float32, (3, 10)),
        "prefix_choices": (torch.int64, (3, 7)),
    }


def test_batches_only_change_who_is_computed_with_whom(llama):
    text = tiny.text_of(99)
    one, three = (probes_of(llama, text, 8, 10, 5, batch_size=b) for b in (1, 3))
    assert torch.equal(one.tokens, three.tokens)
    assert one.identity != three.identity  # a run must not mix batch shapes: they round otherwise


def test_a_prefix_of_one_token_has_no_choices(llama):
    assert probes_of(llama, "abc", prefix=1).prefix_choices.shape == (3, 0)


def test_a_tokenizer_that_starts_a_text_starts_each_prefix(llama):
    probes = probes_of(llama, "abcdefghi", tokenizer=tiny.tokenizer_of_characters(start=True))
    assert prefixes(probes) == ["<s>abc", "<s>def", "<s>ghi"]


def test_what_a_tokenizer_puts_behind_a_text_is_in_no_prefix(llama):
    framed, ended = (tiny.tokenizer_of_characters(start=s, end=True) for s in (True, False))
    assert prefixes(probes_of(llama, "abcdef", count=2, tokenizer=framed)) == ["<s>abc", "<s>def"]
    assert prefixes(probes_of(llama, "abcdefgh", count=2, tokenizer=ended)) == ["abcd", "efgh"]


def test_a_prefix_with_room_for_the_start_only_is_refused(llama):
    with pytest.raises(ProbeError, match="prefix of 1 tokens has no room for text behind the 1 starting"):
        probes_of(llama, "abc", prefix=1, tokenizer=tiny.tokenizer_of_characters(start=True))


@pytest.mark.parametrize("name", ["prefix", "completion", "count", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "4", None])
def test_lengths_and_counts_are_positive_whole_numbers(llama, name, value):
    with pytest.raises(ProbeError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
        probes_of(llama, "abcdefghi", **{name: value})


def test_the_context_is_the_limit(llama):
    text = tiny.text_of(200)
    assert len(probes_of(llama, text, tiny.CONTEXT - 4, 4, 1)) == 1
    with pytest.raises(ProbeError, match=r"124 \+ 5 is beyond the model's context of 128 tokens"):
        probes_of(llama, text, tiny.CONTEXT - 4, 5, 1)


@pytest.mark.parametrize("text", ["abc", ["abc", "abc"], "", []])
def test_a_text_shorter_than_a_prefix_is_refused(llama, text):
    with pytest.raises(ProbeError, match=r"the text is shorter than one prefix: \d tokens, a prefix has 4"):
        probes_of(llama, text)


def test_a_model_in_train_mode_is_refused(llama):
    with pytest.raises(ModelError, match="the model is in train mode"):
        probes_of(llama.train(), "abc " * 20)


def test_a_tokenizer_of_another_vocabulary_is_refused(llama):
    with pytest.raises(ModelError, match="another vocabulary"):
        probes_of(llama, "abcdefghi", tokenizer=tiny.tokenizer_of_characters(extra=9))


def cached(model, text="abcdefghijkl", prefix=4, completion=5, count=3, **options) -> Probes:
    return probes_of(model, text, prefix, completion, count, cache=True, **options)


def files(folder) -> list:
    return sorted((folder / "probes").glob("*"))


def without_forward(model, monkeypatch) -> None:
    def forward(*_, **__):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(model, "forward", forward)


def assert_same(a: Probes, b: Probes) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_a_second_time_the_probes_come_from_the_cache(llama, fresh_cache, monkeypatch):
    first = cached(llama)
    without_forward(llama, monkeypatch)
    assert_same(cached(llama), first)
    assert len(files(fresh_cache)) == 1


def test_without_the_cache_nothing_is_written(llama, fresh_cache):
    probes_of(llama, "abcdefghijkl")
    assert not fresh_cache.exists()


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other tensors", "no lengths", "one byte"])
def test_a_damaged_cache_file_is_made_anew(llama, fresh_cache, monkeypatch, damage):
    first = cached(llama)
    (file,) = files(fresh_cache)
    sound = file.read_bytes()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "half":
        file.write_bytes(sound[: len(sound) // 2])
    elif damage == "text":
        file.write_text("no safetensors at all")
    elif damage == "one byte":
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    elif damage == "other tensors":
        save_file({"something": torch.zeros(2)}, file, metadata={"prefix": "4"})
    else:
        save_file({"tokens": first.tokens, "margins": first.margins}, file)
    assert_same(cached(llama), first)
    without_forward(llama, monkeypatch)
    assert_same(cached(llama), first)
    assert files(fresh_cache) == [file]


@pytest.mark.parametrize(
    "change",
    [{"prefix": 3}, {"completion": 6}, {"text": "bacdefghijkl"}, {"count": 2}, {"batch_size": 2}],
    ids=lambda change: next(iter(change)),
)
def test_other_probes_are_cached_elsewhere(llama, fresh_cache, change):
    cached(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached(llama, **change)
    assert len(files(fresh_cache)) == 2


def test_other_models_are_cached_elsewhere(fresh_cache):
    models = [
        tiny.model_of("llama"),
        tiny.model_of("llama", seed=1),
        tiny.model_of("llama").bfloat16(),
        tiny.model_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    ]
    for model in models:
        cached(model)
    assert len(files(fresh_cache)) == len(models)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, patch: model.set_attn_implementation("eager"),
        lambda model, patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        lambda model, patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        lambda model, patch: patch.setattr(torch, "__version__", "9.9"),
    ],
    ids=["attention", "threads", "instructions", "torch"],
)
def test_what_may_round_otherwise_is_cached_elsewhere(llama, fresh_cache, monkeypatch, change):
    first = cached(llama)
    change(llama, monkeypatch)
    assert torch.equal(cached(llama).tokens, first.tokens)
    assert len(files(fresh_cache)) == 2


def test_another_tokenizer_is_cached_elsewhere(llama, fresh_cache):
    cached(llama)
    cached(llama, tokenizer=tiny.tokenizer_of_characters(extra=1))
    assert len(files(fresh_cache)) == 2


def test_a_cache_that_cannot_be_written_is_only_a_warning(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DTM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="the probes are not cached: .*Not a directory"):
        assert len(cached(llama)) == 3


def test_the_identity_is_of_tokens_and_lengths(llama):
    one = probes_of(llama, "abcdefghijkl")
    others = [
        probes_of(llama, "abcdefghijkm"),
        probes_of(llama, "abcdefghijkl", completion=6),
        Probes(one.tokens, 5, 4, one.margins, one.prefix_choices, 0, 8),
    ]
    assert len({one.identity, *(other.identity for other in others)}) == 4


def test_the_full_pass_confirms_the_completion(llama):
    probes = probes_of(llama, tiny.text_of(99), 8, 10)
    assert torch.equal(logits_before(llama, probes.tokens, 8).argmax(-1), probes.tokens[:, 8:])

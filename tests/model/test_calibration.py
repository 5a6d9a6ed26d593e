"""A calibration says what enters each component, is computed once and never half written."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from dtm_fast.errors import InputError, MeasurementError, ModelError
from dtm_fast.model import Calibration, Decoder, InputStatistics, calibration, model_identity
from dtm_fast.model.input_statistics import InputSums

TOKENS = torch.randint(3, tiny.VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(3))
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"


def inputs_of(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What enters each component, float64 [tokens, K], by hooks of the simplest kind, a sequence at a time."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        component.module.register_forward_pre_hook(
            lambda module, args, path=path: seen.setdefault(path, []).append(
                args[0].double().reshape(-1, args[0].shape[-1])
            )
        )
        for path, component in Decoder.of(model).components.items()
    ]
    with torch.no_grad():
        for row in tokens:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {path: torch.cat(each) for path, each in seen.items()}


def assert_is_of(found: InputStatistics, x: Tensor) -> None:
    """Sums of products of float32 are off by some of the last digits of the largest of them."""
    assert (found.count, found.width) == x.shape
    assert found.squared_norm.dtype == found.gram.dtype == torch.float32
    expected = x.T @ x
    scale = float(expected.diagonal().max())
    torch.testing.assert_close(found.gram.double(), expected, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(found.squared_norm.double(), x.square().sum(0), rtol=1e-5, atol=0)


def assert_same(one: Calibration, other: Calibration) -> None:
    assert (one.identity, one.model, list(one.inputs)) == (other.identity, other.model, list(other.inputs))
    for path, statistics in one.inputs.items():
        twin = other.inputs[path]
        assert (statistics.count, statistics.width, statistics.identity) == (
            twin.count,
            twin.width,
            twin.identity,
        )
        assert torch.equal(statistics.gram, twin.gram)
        assert torch.equal(statistics.squared_norm, twin.squared_norm)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "calibrations").iterdir()) if folder.exists() else []


def stored_again(file: Path, **changes: Callable[[str], str | None]) -> None:
    """The same tensors with changed metadata; what becomes None is left out."""
    with safe_open(file, framework="pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in list(stored.keys())}, stored.metadata()
    changed = metadata | {key: change(metadata[key]) for key, change in changes.items()}
    assert changed != metadata
    calibration.save_file(tensors, file, metadata={k: v for k, v in changed.items() if v is not None})


def nothing_may_be_computed(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(model, "forward", refuse)


# What it says.


@pytest.mark.parametrize("cache", [False, True])
def test_it_is_what_enters_each_component(family, fresh_cache, cache):
    model = tiny.model_of(family)
    expected = inputs_of(model, TOKENS)
    found = Calibration.collect(model, TOKENS, batch_size=2, cache=cache)
    assert list(found.inputs) == list(Decoder.of(model).components)
    for path, x in expected.items():
        assert_is_of(found.inputs[path], x)
    assert len({float(each.squared_norm.sum()) for each in found.inputs.values()}) > 5


def test_the_weight_of_gpt2_that_is_stored_transposed_has_its_inputs_width(fresh_cache):
    model = tiny.model_of("gpt2")
    decoder = Decoder.of(model, Calibration.collect(model, TOKENS))
    for component in decoder.components.values():
        assert component.transposed
        assert component.inputs is not None
        assert component.inputs.width == component.shape[1]


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        (
            "llama",
            [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
        ),
        ("opt", [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]]),
        ("gpt_neox", []),
    ],
)
def test_what_components_share_is_stored_once(name, shared, fresh_cache):
    model = tiny.model_of(name)
    found = Calibration.collect(model, TOKENS)
    decoder = Decoder.of(model, found)
    groups: dict[int, list[str]] = {}
    for component in decoder.components.values():
        if component.layer == 1:
            groups.setdefault(id(component.inputs), []).append(component.name)
    assert [names for names in groups.values() if len(names) > 1] == shared
    (file,) = files(fresh_cache)
    with safe_open(file, framework="pt") as stored:
        assert len(list(stored.keys())) == 2 * 3 * len(groups)  # gram and norm, three layers


def test_components_that_only_use_the_same_memory_do_not_share(llama):
    mlp = llama.model.layers[1].mlp

    def forward(x: Tensor) -> Tensor:
        gated = mlp.act_fn(mlp.gate_proj(x))
        return mlp.down_proj(gated * mlp.up_proj(x.mul_(2)))

    mlp.forward = forward
    expected = inputs_of(llama, TOKENS)
    found = Calibration.collect(llama, TOKENS, cache=False)
    assert found.inputs[GATE] is not found.inputs[UP]
    assert torch.equal(expected[UP], 2 * expected[GATE])
    for path in (GATE, UP):
        assert_is_of(found.inputs[path], expected[path])


def test_components_that_share_in_some_calls_only_are_refused(llama):
    mlp = llama.model.layers[1].mlp
    calls = iter(range(100))

    def forward(x: Tensor) -> Tensor:
        other = x if next(calls) < 2 else x + 1
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(other))

    mlp.forward = forward
    with pytest.raises(ModelError) as error:
        Calibration.collect(llama, TOKENS, batch_size=1, cache=False)
    assert str(error.value) == f"{UP} has the input of {GATE} in some calls, and another one in others"
    assert not any(c.module._forward_pre_hooks for c in Decoder.of(llama).components.values())


def test_an_expert_that_no_token_chose_takes_no_part(llama):
    mlp = llama.model.layers[1].mlp
    calls = iter(range(100))

    def forward(x: Tensor) -> Tensor:
        chosen = x.flatten(0, 1)[: 0 if next(calls) == 0 else 7]  # of the first batch none
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(chosen)) * mlp.up_proj(chosen))
        return torch.zeros_like(x)

    mlp.forward = forward
    found = Calibration.collect(llama, TOKENS, batch_size=2, cache=False)
    assert found.inputs[UP] is found.inputs[GATE]
    assert found.inputs[UP].count == 14


def test_inputs_without_a_token_say_nothing_of_what_is_shared(llama):
    mlp = llama.model.layers[1].mlp
    calls = iter(range(100))

    def forward(x: Tensor) -> Tensor:
        one, other = (x.new_empty(0, 32), x.new_empty(0, 32)) if next(calls) == 0 else (x, x + 1)
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(one)) * mlp.up_proj(other))
        return torch.zeros_like(x)

    mlp.forward = forward
    found = Calibration.collect(llama, TOKENS, batch_size=2, cache=False)
    assert found.inputs[UP] is not found.inputs[GATE]
    assert found.inputs[UP].count == found.inputs[GATE].count == 3 * 24


def test_statistics_of_a_bfloat16_model_are_float32(llama, fresh_cache):
    model = llama.bfloat16()
    found = Calibration.collect(model, TOKENS, batch_size=1)
    for path, x in inputs_of(model, TOKENS).items():
        assert_is_of(found.inputs[path], x)


def test_inference_mode_around_it_changes_nothing(llama):
    with torch.inference_mode():
        found = Calibration.collect(llama, TOKENS, cache=False)
    assert_same(found, Calibration.collect(llama, TOKENS, cache=False))
    assert found.inputs[UP] is found.inputs[GATE]


def test_sums_by_hand():
    found = InputStatistics.of(torch.tensor([[[1.0, 2.0]], [[3.0, -4.0]]]))
    assert (found.count, found.width) == (2, 2)
    assert found.squared_norm.tolist() == [10.0, 20.0]
    assert found.gram.tolist() == [[10.0, -10.0], [-10.0, 20.0]]


def test_of_many_batches_no_small_one_is_lost():
    """In float32 2²⁶ + 1 is 2²⁶, however often 1 is added."""
    sums = InputSums(1)
    sums.add(torch.tensor([[2.0**13]]))
    for _ in range(64):
        sums.add(torch.tensor([[1.0]]))
    assert sums.statistics("").gram.item() == sums.statistics("").squared_norm.item() == 2.0**26 + 64


def test_the_model_is_left_as_it_was(family):
    model = tiny.model_of(family)
    before = model_identity(model)
    Calibration.collect(model, TOKENS, cache=False)
    assert model_identity(model) == before
    assert not any(c.module._forward_pre_hooks for c in Decoder.of(model).components.values())


# The cache.


def test_a_second_time_nothing_is_computed(llama, fresh_cache, monkeypatch):
    first = Calibration.collect(llama, TOKENS)
    assert [file.name for file in files(fresh_cache)] == [f"{first.identity}.safetensors"]
    nothing_may_be_computed(monkeypatch, llama)
    for batch_size in (8, 2):
        assert_same(Calibration.collect(llama, TOKENS, batch_size=batch_size), first)
    assert_same(Calibration.collect(tiny.model_of("llama"), TOKENS.clone()), first)


def test_what_is_in_memory_is_what_is_in_the_cache(llama, fresh_cache):
    assert_same(Calibration.collect(llama, TOKENS, cache=False), Calibration.collect(llama, TOKENS))


def test_without_the_cache_nothing_is_read_or_written(llama, fresh_cache, monkeypatch):
    Calibration.collect(llama, TOKENS, cache=False)
    assert not fresh_cache.exists()
    Calibration.collect(llama, TOKENS)
    nothing_may_be_computed(monkeypatch, llama)
    with pytest.raises(AssertionError, match="the model was run"):
        Calibration.collect(llama, TOKENS, cache=False)


def test_other_tokens_and_other_models_are_other_calibrations(llama, fresh_cache):
    made = [
        Calibration.collect(llama, TOKENS),
        Calibration.collect(llama, TOKENS - 1),
        Calibration.collect(llama, TOKENS.reshape(10, 12)),
        Calibration.collect(tiny.model_of("llama", seed=1), TOKENS),
        Calibration.collect(tiny.model_of("llama").bfloat16(), TOKENS),
    ]
    assert len({each.identity for each in made}) == len(made) == len(files(fresh_cache))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x10" * 100),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: calibration.save_file({"x": torch.ones(1)}, file),
        lambda file: calibration.save_file(
            {"x": torch.ones(1)}, file, metadata={"owners": "{}", "counts": '{"y": 1}'}
        ),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
        lambda file: stored_again(file, counts=lambda counts: counts.replace("120", "121")),
        lambda file: stored_again(file, checksum=lambda _: None),
    ],
)
def test_a_damaged_file_is_made_anew(llama, fresh_cache, damage, monkeypatch):
    first = Calibration.collect(llama, TOKENS, cache=False)
    Calibration.collect(llama, TOKENS)
    (file,) = files(fresh_cache)
    damage(file)
    assert_same(Calibration.collect(llama, TOKENS), first)
    nothing_may_be_computed(monkeypatch, llama)
    assert_same(Calibration.collect(llama, TOKENS), first)
    assert files(fresh_cache) == [file]


def test_a_cache_that_is_deleted_is_still_read_by_who_has_it_open(llama, fresh_cache):
    first = Calibration.collect(llama, TOKENS)
    (file,) = files(fresh_cache)
    file.unlink()
    assert_same(first, Calibration.collect(llama, TOKENS, cache=False))


def test_a_cache_that_cannot_be_written_is_only_a_warning(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DTM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="the calibration is not cached: .*Not a directory"):
        found = Calibration.collect(llama, TOKENS)
    assert_same(found, Calibration.collect(llama, TOKENS, cache=False))


KILLED = """
import os, signal, sys
import tiny, torch
from dtm_fast.model import Calibration, calibration

whole = calibration.save_file

def half(tensors, file, metadata):
    whole(tensors, file, metadata=metadata)
    os.truncate(file, os.path.getsize(file) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

calibration.save_file = half
Calibration.collect(tiny.model_of("llama"), torch.load(sys.argv[1]))
"""


@pytest.mark.process
def test_a_process_killed_while_it_writes_leaves_no_calibration(llama, fresh_cache, tmp_path):
    torch.save(TOKENS, tmp_path / "tokens.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(tiny.__file__).parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "tokens.pt")], env=environment, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    (unfinished,) = files(fresh_cache)
    assert unfinished.suffix != ".safetensors"
    found = Calibration.collect(llama, TOKENS)
    assert_same(found, Calibration.collect(llama, TOKENS, cache=False))
    assert sorted(file.suffix == ".safetensors" for file in files(fresh_cache)) == [False, True]


# What is refused.


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (TOKENS.int(), "calibration tokens: expected int64 [S, T], got torch.int32 [5, 24]"),
        (TOKENS[0], "calibration tokens: expected int64 [S, T], got torch.int64 [24]"),
        (TOKENS.tolist(), "calibration tokens: expected int64 [S, T], got <class 'list'>"),
        (TOKENS[:0], "calibration tokens: there are none in [0, 24]"),
        (TOKENS + 40, "calibration tokens: ids go from 43 to 140, the model embeds 101"),
        (TOKENS - 9, "calibration tokens: ids go from -6 to 91, the model embeds 101"),
        (TOKENS.repeat(1, 6), "calibration tokens: 144 are beyond the model's context of 128 tokens"),
    ],
)
def test_tokens_that_cannot_be_read_are_said_in_one_line(llama, tokens, said):
    with pytest.raises(InputError) as error:
        Calibration.collect(llama, tokens)
    assert str(error.value) == said


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_inputs_that_are_not_finite_name_the_component(llama, fresh_cache, value):
    llama.model.layers[1].post_attention_layernorm.weight.data[5] = value
    with pytest.raises(MeasurementError) as error:
        Calibration.collect(llama, TOKENS)
    assert str(error.value) == f"{GATE}: its inputs are not finite, or too large to be squared"
    assert not any(c.module._forward_pre_hooks for c in Decoder.of(llama).components.values())
    assert not fresh_cache.exists()


def test_a_model_in_train_mode_is_refused(llama, fresh_cache):
    with pytest.raises(ModelError, match=r"the model is in train mode, .*: model.eval\(\)"):
        Calibration.collect(llama.train(), TOKENS)
    assert not fresh_cache.exists()


def test_a_calibration_of_another_model_is_refused(llama, fresh_cache):
    found = Calibration.collect(llama, TOKENS)
    for other in (tiny.model_of("llama", seed=1), tiny.model_of("mistral")):
        with pytest.raises(ModelError, match="the calibration is of another model"):
            Decoder.of(other, found)
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ModelError, match="or of this one with other weights"):
        Decoder.of(llama, found)


def test_without_a_calibration_components_have_no_inputs(llama):
    assert {component.inputs for component in Decoder.of(llama).components.values()} == {None}


@pytest.mark.gpu
def test_on_a_gpu_the_statistics_end_on_the_cpu(cuda, fresh_cache):
    model = tiny.model_of("llama")
    expected = inputs_of(model, TOKENS)
    found = Calibration.collect(model.to(cuda), TOKENS.to(cuda))
    for path, x in expected.items():
        assert found.inputs[path].gram.device.type == "cpu"
        assert_is_of(found.inputs[path], x)

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import plain_loop
import pytest
import tiny
import torch
from recoveries import (
    LONG,
    PRUNED,
    SMALL,
    UP,
    before_each_step,
    dropped_by_sorting,
    interrupted,
    random_tokens,
    stop_at,
    whole,
)
from safetensors.torch import load_file
from same_state import assert_same_state
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, PreTrainedModel

from dtm_fast import Prune
from dtm_fast.compression import checkpoints
from dtm_fast.compression.recovery import recover
from dtm_fast.errors import RunError, TrainingError
from dtm_fast.runs import RunDirectory

pytestmark = pytest.mark.once


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 7])
def test_an_interrupted_training_goes_on_and_ends_in_the_same_bits(steps, tmp_path):
    expected, losses = whole(tmp_path / "whole")
    model = stop_at(tiny.model_of("llama"), steps)
    with pytest.raises(KeyboardInterrupt):
        recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").glob("checkpoint-*")] == [f"checkpoint-{steps // 2 * 2}"]
    again, computed = tiny.model_of("llama"), []
    before_each_step(again, computed.append)
    found = recover(again, PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert len(computed) == 8 - steps // 2 * 2
    assert found.losses == losses
    assert_same_state(again, expected)
    assert_same_state(AutoModelForCausalLM.from_pretrained(found.model), expected)
    stored = [(tmp_path / folder / "model" / "model.safetensors").read_bytes() for folder in ("whole", "r")]
    assert stored[0] == stored[1]


_TRAIN_AND_KILL = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import tiny, torch
from recoveries import LONG, PRUNED, random_tokens
from dtm_fast.compression.recovery import recover
folder, threads = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(11)
for steps in (0, 6, 20, 34):  # no thread is started before a fork
    child = os.fork()
    if not child:
        torch.set_num_threads(threads)
        recover(tiny.model_of("llama"), PRUNED, random_tokens(), LONG, folder)
        os._exit(0)
    while not any(int(path.name[11:]) >= steps for path in folder.glob("checkpoint-*")):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "finished before it was killed"
    assert not (folder / "model").exists()
    print(max(int(path.name[11:]) for path in folder.glob("checkpoint-*")))
"""


@pytest.mark.process
def test_killed_again_and_again_it_ends_in_the_same_bits(tmp_path):
    expected, losses = whole(tmp_path / "whole", LONG)
    ended = subprocess.run(
        [sys.executable, "-c", _TRAIN_AND_KILL, tmp_path / "r", str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert ended.returncode == 0, ended.stderr
    reached = [int(line) for line in ended.stdout.split()]
    assert reached == sorted(reached)
    model, computed = tiny.model_of("llama"), []
    before_each_step(model, computed.append)
    found = recover(model, PRUNED, random_tokens(), LONG, tmp_path / "r")
    assert len(computed) == 80 - reached[-1]
    assert found.losses == losses
    assert_same_state(model, expected)


def test_what_a_killed_process_left_half_written_or_half_removed_is_not_read(tmp_path):
    settings = replace(SMALL, masked_steps=10)
    expected, losses = whole(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        recover(stop_at(tiny.model_of("llama"), 11), PRUNED, random_tokens(), settings, tmp_path / "r")
    assert (tmp_path / "r" / "checkpoint-10").is_dir()
    for name in (".unfinished-checkpoint-12", ".unfinished-model", "checkpoint-8"):
        (tmp_path / "r" / name).mkdir()
        (tmp_path / "r" / name / "weights.safetensors").write_bytes(b"\x10" * 100)
    model = tiny.model_of("llama")
    assert recover(model, PRUNED, random_tokens(), settings, tmp_path / "r").losses == losses
    assert_same_state(model, expected)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "journal.sqlite",
        "lock",
        "losses.json",
        "model",
    ]
    assert sorted(path.name for path in (tmp_path / "r" / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    expected, losses = whole(tmp_path / "whole")
    save, saved = checkpoints.save_file, []

    def full(tensors, file):
        saved.append(file)
        if len(saved) == 6:  # two files each: at 0, at 2, and the second at 4
            raise OSError(28, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RunError, match=r"checkpoint-4: cannot be written: .*No space left on device"):
        recover(tiny.model_of("llama"), PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert [path.name for path in (tmp_path / "r").glob("*checkpoint*")] == ["checkpoint-2"]
    model = tiny.model_of("llama")
    assert recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r").losses == losses
    assert_same_state(model, expected)


def test_a_finished_training_is_not_trained_again(tmp_path):
    expected, losses = whole(tmp_path / "r")
    model = stop_at(tiny.model_of("llama"), 0)
    found = recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert (found.losses, found.masked, found.model) == (losses, 5, tmp_path / "r" / "model")
    assert_same_state(model, expected)
    assert json.loads((tmp_path / "r" / "losses.json").read_text()) == {"masked": 5, "losses": losses}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: (r / "model" / "model.safetensors").write_bytes(b"\x10" * 100), "model: cannot be read"),
        (lambda r: (r / "losses.json").unlink(), "losses.json is missing"),
        (lambda r: (r / "losses.json").write_text("{"), "losses.json: cannot be read"),
    ],
)
def test_what_was_finished_and_is_damaged_is_said_in_one_line(damage, said, tmp_path):
    whole(tmp_path / "r")
    damage(tmp_path / "r")
    with pytest.raises(RunError, match=said) as error:
        recover(tiny.model_of("llama"), PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "losses.json"])
def test_a_damaged_checkpoint_is_said_in_one_line(name, tmp_path):
    interrupted(tmp_path / "r", 4)
    file = tmp_path / "r" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        RunError, match=r"checkpoint-4: the checkpoint cannot be read: .*; delete .*r to start"
    ) as error:
        recover(tiny.model_of("llama"), PRUNED, random_tokens(4), SMALL, tmp_path / "r")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": random_tokens(5)}, "tokens differs"),
        ({"configuration": {UP: Prune(0.5)}}, "configuration differs"),
        ({"model": tiny.model_of("llama", seed=1)}, "model differs"),
        ({"settings": replace(SMALL, seed=1)}, "seed differs: begun with 0, now 1"),
        ({"settings": replace(SMALL, micro_batch=2)}, "micro_batch differs: begun with 4, now 2"),
    ],
)
def test_a_folder_of_other_arguments_is_refused(changed, said, tmp_path):
    interrupted(tmp_path / "r", 2)
    given = {
        "model": tiny.model_of("llama"),
        "configuration": PRUNED,
        "tokens": random_tokens(4),
        "settings": SMALL,
    }
    given |= changed
    before = {name: weight.clone() for name, weight in given["model"].state_dict().items()}
    with pytest.raises(RunError, match=said) as error:
        recover(*given.values(), tmp_path / "r")
    assert len(str(error.value).splitlines()) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in given["model"].state_dict().items())


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    interrupted(tmp_path / "r", 2)
    with RunDirectory.read(tmp_path / "r") as run:
        identity = run.journal.identity
    with RunDirectory.resume(tmp_path / "r", identity), pytest.raises(RunError, match="in use"):
        recover(tiny.model_of("llama"), PRUNED, random_tokens(4), SMALL, tmp_path / "r")


# What is no number.


def assert_put_back(model: PreTrainedModel, checkpoint: Path) -> None:
    for name, weight in load_file(checkpoint / "weights.safetensors").items():
        assert torch.equal(model.get_parameter(name), weight)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("step", "part", "kept"), [(0, "masked", 0), (3, "masked", 2), (6, "unmasked", 6)])
def test_a_loss_that_is_nan_stops_and_loses_nothing(step, part, kept, tmp_path):
    expected, losses = whole(tmp_path / "whole")
    model, calls = tiny.model_of("llama"), iter(range(100))
    hook = model.model.norm.register_forward_hook(
        lambda _, __, output: output * (math.nan if next(calls) == step else 1)
    )
    checkpoint = tmp_path / "r" / f"checkpoint-{kept}"
    with pytest.raises(TrainingError) as error:
        recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert str(error.value) == (
        f"recovery, step {step + 1} of 8 ({part}): the loss is nan; "
        f"the model is put back to {checkpoint}, which is kept"
    )
    assert_put_back(model, checkpoint)
    hook.remove()
    again = tiny.model_of("llama")
    assert recover(again, PRUNED, random_tokens(), SMALL, tmp_path / "r").losses == losses
    assert_same_state(again, expected)


def test_a_gradient_that_is_infinite_stops(tmp_path):
    model = tiny.model_of("llama")
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        TrainingError, match=r"step 1 of 8 \(masked\): the norm of the gradient is (inf|nan); .*-0, which"
    ):
        recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r")
    assert_put_back(model, tmp_path / "r" / "checkpoint-0")


def test_a_gradient_that_is_nan_where_nothing_is_left_is_of_no_account(tmp_path):
    expected, losses = whole(tmp_path / "whole")
    model = tiny.model_of("llama")
    weight = model.get_submodule(UP).weight
    mask, calls = dropped_by_sorting(weight, 0.5), iter(range(100))
    weight.register_hook(
        lambda gradient: gradient.masked_fill(mask, math.nan) if next(calls) < 5 else gradient
    )
    assert recover(model, PRUNED, random_tokens(), SMALL, tmp_path / "r").losses == losses
    assert_same_state(model, expected)


@pytest.mark.parametrize(
    "settings", [replace(SMALL, checkpoint_every=1), replace(SMALL, masked_steps=1, unmasked_steps=0)]
)
def test_weights_that_are_not_finite_are_never_kept(settings, tmp_path):
    model = tiny.model_of("llama")
    said = r"step 1 of . \(masked\): the sum of model\.norm\.weight is inf; .*-0, which is kept"
    hook = register_optimizer_step_post_hook(lambda *_: model.model.norm.weight.detach().fill_(math.inf))
    try:
        with pytest.raises(TrainingError, match=said):
            recover(model, PRUNED, random_tokens(), settings, tmp_path / "r")
    finally:
        hook.remove()
    assert_put_back(model, tmp_path / "r" / "checkpoint-0")
    assert not (tmp_path / "r" / "model").exists()
    for path, prune in PRUNED.items():
        pruned = plain_loop.prune(tiny.model_of("llama").get_submodule(path).weight, prune.sparsity)
        assert torch.equal(model.get_submodule(path).weight, pruned)

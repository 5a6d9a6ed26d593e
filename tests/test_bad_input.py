"""Whatever cannot be used ends with exit code 2, one line that names it, and nothing written."""

import fcntl
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from journal_rows import finished
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config, ViTConfig

import dtm_fast as dtm
from dtm_fast.cli import setting
from dtm_fast.errors import ComponentError, ModelError, ProbeError, TreatmentError
from dtm_fast.ops import native
from dtm_fast.ops.layer_weights import Arithmetic, has_arithmetic

SMALL = ("--prefix", 8, "--completion", 6, "--probes", 2)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Bomb:
    """Unpickled, it makes the file ``opened`` beside itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "opened"),)


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(folder)}, folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    code = f"import os\nos.mkdir({str(folder / 'opened')!r})\n"
    for name in ("configuration_own.py", "modeling_own.py"):
        (folder / name).write_text(code)
    change_config(
        folder,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )


def other_tokenizer(folder: Path) -> None:
    tiny.tokenizer_of_characters(extra=9).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    shards = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
    "truncated config": (lambda f: cut(f / "config.json"), "no usable model configuration: "),
    "config without a type": (
        lambda f: (f / "config.json").write_text("{}"),
        "no usable model configuration: ",
    ),
    "unknown type": (lambda f: change_config(f, model_type="own"), "no usable model configuration: .*own"),
    "BERT": (
        lambda f: BertConfig(architectures=["BertModel"]).save_pretrained(f),
        "not a causal language model: BertModel",
    ),
    "architectures that are none": (
        lambda f: change_config(f, architectures=[0]),
        r"architectures: expected names, got \[0\]|no usable model configuration: ",
    ),
    "T5": (lambda f: T5Config().save_pretrained(f), "not a causal language model: t5"),
    "vision": (
        lambda f: ViTConfig(architectures=["ViTModel"]).save_pretrained(f),
        "not a causal language model: ViTModel",
    ),
    "truncated weights": (
        lambda f: cut(f / "model.safetensors"),
        r"model\.safetensors: damaged or truncated: ",
    ),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: damaged or truncated: ",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "here is no weights at all"),
    "missing shard": (missing_shard, "the weights cannot be loaded: .*model-00002-of-00002"),
    "missing weight": (
        lambda f: change_weights(f, lambda w: w.pop(UP)),
        rf"1 missing keys in the weights, first: {UP}",
    ),
    "another shape": (
        lambda f: change_weights(f, lambda w: w.update({UP: torch.zeros(3, 3)})),
        "the weights cannot be loaded: |mismatched keys in the weights",
    ),
    "NaN": (
        lambda f: change_weights(f, lambda w: w[UP].__setitem__((0, 0), torch.nan)),
        f"{UP} holds 1 values that are NaN or infinite",
    ),
    "only a pickle": (only_a_pickle, r"only pytorch_model\.bin, a pickle, which could run any code"),
    "remote code": (remote_code, "no usable model configuration: "),
    "tokenizer of another vocabulary": (
        other_tokenizer,
        "the tokenizer is of another vocabulary: its ids go to 107, the model embeds 101",
    ),
    "no tokenizer": (no_tokenizer, "no usable tokenizer: "),
}


def assert_refused(ended, expected: str, run: Path) -> None:
    assert ended.code == 2, ended.err
    assert len(ended.errors) == 1, ended.err
    assert re.search(expected, ended.errors[0]), ended.errors[0]
    assert "Traceback" not in ended.err
    assert not ended.out
    assert not run.exists()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_model_folder(tiny_folder, tmp_path, text_file, command, broken):
    change, expected = BROKEN[broken]
    change(tiny_folder)
    ended = command("plan", tiny_folder, "--run", tmp_path / "run", "--text", text_file, *SMALL)
    assert_refused(ended, expected, tmp_path / "run")
    assert str(tiny_folder) in ended.errors[0]
    with pytest.raises(ModelError, match=expected):
        dtm.load_model(tiny_folder)
    assert not (tiny_folder / "opened").exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(tiny_folder):
    remote_code(tiny_folder)
    change_config(tiny_folder, model_type="llama", architectures=["LlamaForCausalLM"])
    model, _ = dtm.load_model(tiny_folder)
    assert type(model).__module__.startswith("transformers.")
    assert not (tiny_folder / "opened").exists()


def test_a_pickle_beside_safetensors_is_not_opened(tiny_folder):
    torch.save({"bomb": Bomb(tiny_folder)}, tiny_folder / "pytorch_model.bin")
    dtm.load_model(tiny_folder)
    assert not (tiny_folder / "opened").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./no/such/folder", r"\./no/such/folder: no such folder, and not a hub name"),
        ("/no/such/folder", "/no/such/folder: no such folder, and not a hub name"),
        ("some body/some model", "no such folder, and not a hub name"),
        ("no-such-org/no-such-model", "no-such-org/no-such-model: no usable model configuration: "),
        ("{file}", r"text\.bin: a model is a folder, a \.gguf file or a hub name, not this file"),
        ("{gguf}", r"bad\.gguf: the GGUF cannot be loaded: "),
        ("", "the folder has no config.json"),
    ],
)
def test_a_model_that_is_not_there(tmp_path, text_file, command, name, expected):
    (tmp_path / "text.bin").write_bytes(b"pickle")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    name = name.format(file=tmp_path / "text.bin", gguf=tmp_path / "bad.gguf")
    ended = command("sweep", name, "--run", tmp_path / "run", "--text", text_file, *SMALL)
    assert_refused(ended, expected, tmp_path / "run")
    with pytest.raises(ModelError, match=expected):
        dtm.load_model(name)


OPTIONS = {
    "--batch-size 99999999999999999999": "batch_size must be at most 2147483647, not 99999999999999999999",
    "--treatment int9": "no treatment 'int9'; known: int8, w8a8, llm_int8, int4, gptq, prune",
    "--treatment prune(1.5)": r"Prune: sparsity must lie in \[0, 1\], not 1\.5",
    "--treatment prune": "treatment 'prune': wrong arguments for prune",
    "--rank-by bleu": "no ranking 'bleu'; known: fdt75, dppl, perplexity",
    "--rank-by perplexity --prefix 1": "ranking by perplexity needs prefixes of at least 2 tokens",
    "--dtype float8": "no dtype 'float8'; known: auto, float32, bfloat16",
    "--prefix 0": "prefix must be a whole number of at least 1, not 0",
    "--prefix -3": "prefix must be a whole number of at least 1, not -3",
    "--prefix 123": r"123 \+ 6 is beyond the model's context of 128 tokens",
    "--completion 0": "completion must be a whole number of at least 1, not 0",
    "--completion -1": "completion must be a whole number of at least 1, not -1",
    "--completion 999": r"8 \+ 999 is beyond the model's context of 128 tokens",
    "--probes 0": "probes must be a whole number of at least 1, not 0",
    "--batch-size 0": "batch_size must be a whole number of at least 1, not 0",
    "--text {short}": "the text is shorter than one prefix: 3 tokens, a prefix has 8",
    "--text {empty}": r"empty\.txt: holds no text",
    "--text {binary}": r"binary\.txt: cannot be read as text: not UTF-8 text",
    "--text {lines}": r"lines\.jsonl, line 2: neither a JSON string nor an object",
    "--text /no/such/text": "/no/such/text: cannot be read as text: No such file or directory",
}
PLAN_OPTIONS = {
    "--components 0": "stop: at least 1 component, not 0",
    "--components -1": "stop: at least 1 component, not -1",
    "--share 0": r"stop: share must lie in \(0, 1\], not 0",
    "--share -0.5": r"stop: share must lie in \(0, 1\], not -0\.5",
    "--share 1.5": r"stop: share must lie in \(0, 1\], not 1\.5",
    "--min-fdt -1": r"stop: min_fdt must lie in 0 … 6 \(the completion\), not -1",
    "--min-fdt 7": r"stop: min_fdt must lie in 0 … 6 \(the completion\), not 7",
    "--every 0": "every: at least 1 component between two measurements, not 0",
}
CASES = [("plan", o) for o in (*OPTIONS, *PLAN_OPTIONS)] + [("sweep", o) for o in OPTIONS]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_bad_option(tiny_folder, tmp_path, text_file, command, name, options):
    texts = {n: tmp_path / f"{n}.txt" for n in ("short", "empty", "binary")} | {
        "lines": tmp_path / "lines.jsonl"
    }
    for file, content in zip(texts.values(), (b"abc", b"", b"\xff\xfe\x00", b'"x"\n{'), strict=True):
        file.write_bytes(content)
    given = options.format(**texts).split(" ")
    arguments = ["--run", tmp_path / "run", "--text", text_file, *SMALL, *given]  # the last one counts
    ended = command(name, tiny_folder, *arguments)
    assert_refused(ended, (OPTIONS | PLAN_OPTIONS)[options], tmp_path / "run")


@pytest.mark.parametrize(
    "options", ["--min-fdt -1", "--min-fdt 99", "--prefix 0", "--dtype int4", "--text /none"]
)
def test_a_bad_option_of_evaluate(tiny_folder, tmp_path, text_file, command, options):
    ended = command("evaluate", tiny_folder, tiny_folder, "--text", text_file, *SMALL, *options.split(" "))
    assert_refused(ended, options.split(" ")[1], tmp_path / "run")


@pytest.mark.parametrize("options", [["--prefix", "many"], ["--no-such-option"], []])
def test_what_typer_refuses(tiny_folder, tmp_path, command, options):
    run = ["--run", tmp_path / "run"] if options else []  # a sweep needs a run directory
    ended = command("sweep", tiny_folder, *run, *options)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [1, 9], ids=["other tokenizer", "other model too"])
def test_models_of_two_vocabularies_are_not_compared(tiny_folder, tmp_path, text_file, command, extra):
    other = tiny.model_of("llama", vocab_size=101 if extra == 1 else 110)
    tiny.save(tmp_path / "other", other, tiny.tokenizer_of_characters(extra=extra))
    ended = command("evaluate", tiny_folder, tmp_path / "other", "--text", text_file, *SMALL)
    expected = rf"{tmp_path / 'other'}: its tokenizer is of another vocabulary than that of {tiny_folder}"
    assert_refused(ended, expected, tmp_path / "run")


@pytest.mark.parametrize(
    ("configuration", "error", "expected"),
    [
        ({"model.layers.1.mlp.up": dtm.Int8()}, ComponentError, r"nearest: model\.layers\.1\.mlp\.up_proj"),
        ({"model.layers.3.mlp.up_proj": dtm.Int8()}, ComponentError, r"no component 'model\.layers\.3\.mlp"),
        ({"model.layers.1.mlp.up_proj": "int8"}, TreatmentError, "'int8' is not a treatment"),
        (["model.layers.1.mlp.up_proj"], TreatmentError, "a configuration maps components to treatments"),
    ],
)
def test_a_configuration_that_does_not_fit(llama_evaluator, configuration, error, expected):
    with pytest.raises(error, match=expected):
        llama_evaluator.measure([configuration])


def test_probes_of_python_callers_are_checked_too(llama):
    with pytest.raises(ProbeError, match="shorter than one prefix"):
        dtm.Probes.from_text(llama, tiny.tokenizer_of_characters(), "abc", prefix=4, cache=False)


@pytest.fixture
def swept(tiny_folder, tmp_path, text_file, command):
    """A finished sweep: its directory and the command that makes it."""
    arguments = ("sweep", tiny_folder, "--run", tmp_path / "run", "--text", text_file, *SMALL)
    assert command(*arguments).code == 0
    return tmp_path / "run", arguments


def assert_only_refused(ended, expected: str) -> None:
    assert (ended.code, len(ended.errors), ended.out) == (2, 1, "")
    assert re.search(expected, ended.errors[0]), ended.errors[0]


def test_a_run_in_use_is_refused_before_the_model_is_loaded(swept, command, monkeypatch):
    run, arguments = swept
    monkeypatch.setattr(setting, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with open(run / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_only_refused(command(*arguments), "in use by another dtm-fast process")


def test_a_run_of_another_model(swept, tmp_path, command, monkeypatch):
    run, (name, _, *options) = swept
    before = finished(run)
    tiny.save(tmp_path / "other", tiny.model_of("llama", seed=1))
    monkeypatch.setattr(dtm.Probes, "from_text", lambda *_, **__: pytest.fail("the base writes"))
    assert_only_refused(command(name, tmp_path / "other", *options), "this run's model differs")
    assert finished(run) == before


def test_a_run_of_other_probes(swept, command):
    run, arguments = swept
    before = finished(run)
    assert_only_refused(command(*arguments, "--prefix", 9), "this run's probes differs")
    assert finished(run) == before


def test_a_run_of_other_layers_where_their_rounding_shows(swept, tmp_path, command):
    """In float32 all decide alike, and a run may go on with others."""
    _, (name, model, *options) = swept
    assert command(name, model, *options, "--evaluator", "transformers").code == 0
    options[options.index("--run") + 1] = tmp_path / "half"
    in_half = (name, model, *options, "--dtype", "bfloat16", "--evaluator")
    assert command(*in_half, "transformers").code == 0
    before = finished(tmp_path / "half")
    assert command(*in_half, "reference").code == 0
    if has_arithmetic(Arithmetic.BFLOAT16):
        said = "this run's layers differs: begun with transformers, now fused"
        assert_only_refused(command(*in_half, "auto"), said)
    assert finished(tmp_path / "half") == before


def test_a_run_of_another_schema_version(swept, command):
    run, arguments = swept
    connection = sqlite3.connect(run / "journal.sqlite")
    connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema_version'")
    connection.commit()
    connection.close()
    before = finished(run)
    assert_only_refused(command(*arguments), "written with schema version 99, this dtm_fast reads 3")
    assert_only_refused(command("report", run), "written with schema version 99, this dtm_fast reads 3")
    assert finished(run) == before


def test_a_run_whose_journal_is_damaged(swept, command):
    run, arguments = swept
    damaged = b"damaged" + (run / "journal.sqlite").read_bytes()[7:]
    (run / "journal.sqlite").write_bytes(damaged)
    expected = r"journal\.sqlite: the journal is damaged; a copy is kept as journal\.sqlite\.damaged-1"
    assert_only_refused(command(*arguments), expected)
    assert_only_refused(command("report", run), expected)
    assert (run / "journal.sqlite").read_bytes() == damaged
    assert (run / "journal.sqlite.damaged-1").read_bytes() == damaged


def test_a_full_disk_keeps_what_was_measured_and_the_same_command_goes_on(
    swept, tmp_path, command, monkeypatch
):
    _, (name, model, _, _, *options) = swept
    arguments, connect = (name, model, "--run", tmp_path / "full", *options), sqlite3.connect

    def small_disk(*given, **options):
        connection = connect(*given, **options)
        connection.execute("PRAGMA max_page_count = 9")  # SQLite's own SQLITE_FULL
        return connection

    monkeypatch.setattr(sqlite3, "connect", small_disk)
    assert_only_refused(
        command(*arguments), "the disk is full; what was measured is kept: free some space and run"
    )
    monkeypatch.setattr(sqlite3, "connect", connect)
    before = finished(tmp_path / "full")
    assert 0 < len(before) < 21
    assert command(*arguments).code == 0
    after = finished(tmp_path / "full")
    assert after[: len(before)] == before
    assert len(after) == 21


@pytest.mark.parametrize("where", ["{file}/run", "{file}", "/proc/run", "/sys/run"])
def test_a_run_directory_that_cannot_be_written(tiny_folder, tmp_path, text_file, command, where):
    (tmp_path / "file").write_text("content")
    run = where.format(file=tmp_path / "file")
    ended = command("plan", tiny_folder, "--run", run, "--text", text_file, *SMALL)
    assert_only_refused(ended, f"{run}: cannot write a run there: [A-Z]")
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("place", ["nowhere", "folder"])
def test_a_report_of_no_run(tmp_path, command, place):
    (tmp_path / "folder").mkdir()
    assert_only_refused(command("report", tmp_path / place), rf"{place}: no run there \(no journal\.sqlite\)")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_names_are_shown_as_they_are(tmp_path, text_file, command):
    folder = tmp_path / "[red]x[b] :smile: [1]"
    folder.mkdir()
    ended = command("sweep", folder, "--run", tmp_path / "run", "--text", text_file)
    assert_refused(ended, "no config.json", tmp_path / "run")
    assert ended.errors[0].startswith(f"error: {folder}: ")


@pytest.mark.parametrize("name", ["doctor", "sweep", "report"])
def test_an_instruction_set_that_cannot_be_used_is_refused_before_anything_is_loaded(
    tmp_path, command, monkeypatch, name
):
    monkeypatch.setattr(native, "_isa_override", "foo")  # as the variable would say it, which is read once
    arguments = {"doctor": (), "sweep": ("none", "--run", tmp_path / "run"), "report": (tmp_path / "run",)}
    ended = command(name, *arguments[name])
    assert_refused(ended, "error: DTM_FAST_CPU_ISA=foo: possible here: reference", tmp_path / "run")


@pytest.mark.process
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_an_output_that_cannot_be_written_is_said_in_one_line(arguments):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "dtm_fast", "doctor", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.stderr == "error: the output cannot be written: No space left on device\n"
    assert ended.returncode == 2


@pytest.mark.process
def test_a_process_of_its_own_ends_with_2_and_one_line(tmp_path):
    arguments = ["plan", str(tmp_path / "none"), "--run", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-m", "dtm_fast", *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == f"error: {tmp_path / 'none'}: no such folder, and not a hub name\n"
    assert not (tmp_path / "run").exists()

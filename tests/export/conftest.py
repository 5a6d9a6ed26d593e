"""Tiny models under plans, as folders that others load."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from made_export import MIXED, Exported, plan_for
from transformers import PreTrainedModel

from dtm_fast.compression import Configuration, configuration_identity
from dtm_fast.export import export_checkpoint


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Exported]:
    """Exports a tiny model under a configuration."""

    def run(
        configuration: Configuration = MIXED, model: PreTrainedModel | None = None, **options
    ) -> Exported:
        model = tiny.model_of("llama") if model is None else model
        folder = tmp_path / "out"
        problems = export_checkpoint(
            model, tiny.tokenizer_of_characters(), plan_for(model, configuration), folder, **options
        )
        return Exported(folder, model, configuration, problems)

    return run


@pytest.fixture(scope="session")
def kept_exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Those that were made for ``copied``, by their configuration."""
    return {"": Exported(tmp_path_factory.mktemp("exports"), tiny.model_of("llama"), {}, [])}


@pytest.fixture
def copied(tmp_path: Path, kept_exports: dict[str, Exported]) -> Callable[[Configuration], Exported]:
    """A copy of an exported folder, to be damaged."""

    def run(configuration: Configuration) -> Exported:
        name = configuration_identity(configuration)
        if name not in kept_exports:
            root, model = kept_exports[""].folder, kept_exports[""].model
            plan, tokenizer = plan_for(model, configuration), tiny.tokenizer_of_characters()
            problems = export_checkpoint(model, tokenizer, plan, root / name)
            kept_exports[name] = Exported(root / name, model, configuration, problems)
        shutil.copytree(kept_exports[name].folder, tmp_path / "out")
        return replace(kept_exports[name], folder=tmp_path / "out")

    return run

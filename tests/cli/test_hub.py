"""Models found on the machine, and fetched by name with a stand-in for the Hub's library."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.cli.hub import find_models, is_hub_name, model_name, resolve
from tpilite.errors import ConfigError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A huggingface_hub whose downloads the test decides."""
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HFValidationError = type("HFValidationError", (ValueError,), {})  # type: ignore[attr-defined]
    module = types.ModuleType("huggingface_hub")
    module.errors = errors  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return module


def test_models_are_found_in_the_cache_and_here(tmp_path: Path) -> None:
    cache, here = tmp_path / "cache", tmp_path / "here"
    repository = cache / "models--meta-llama--Llama-3.2-1B"
    old = write_checkpoint(repository / "snapshots" / "aaa", tiny_config())
    main = write_checkpoint(repository / "snapshots" / "bbb", tiny_config())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    write_checkpoint(here / "mine", tiny_config())
    (here / "empty").mkdir()
    other = write_checkpoint(here / "bert", tiny_config())
    (other / "config.json").write_text('{"model_type": "bert"}')
    damaged = write_checkpoint(here / "damaged", tiny_config())
    (damaged / "config.json").write_text("{")
    (cache / "datasets--x").mkdir()
    assert find_models(here, cache) == {"meta-llama/Llama-3.2-1B": main, "mine": here / "mine"}
    (main / "model.safetensors").unlink()
    assert find_models(here, cache)["meta-llama/Llama-3.2-1B"] == old
    assert find_models(here / "mine", tmp_path / "nothing") == {".": here / "mine"}
    assert model_name(here / "mine") == "mine"


def test_a_name_is_the_hubs_only_where_no_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("meta-llama/Llama-3.2-1B")
    for name in ("fable", "./a/b", "/a/b", "~/a", "a/b/c", "../b", "a/", ""):
        assert not is_hub_name(name), name
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_name("a/b")


def test_a_name_is_fetched_with_what_the_engine_reads(hub: Any, tmp_path: Path) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    hub.snapshot_download = download
    assert resolve("owner/model") == tmp_path
    ((name, patterns),) = asked
    assert name == "owner/model"
    assert {"config.json", "model-*.safetensors", "tokenizer.model"} <= set(patterns)
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in patterns)


@pytest.mark.parametrize("kind", [OSError, ConnectionError, "HFValidationError"])
def test_what_the_hub_refuses_is_one_line(hub: Any, kind: Any) -> None:
    error = getattr(hub.errors, kind) if isinstance(kind, str) else kind

    def download(*_: Any, **__: Any) -> str:
        raise error("401 Client Error.\nAccess to model owner/model is restricted.")

    hub.snapshot_download = download
    with pytest.raises(ConfigError, match=r"owner/model cannot be fetched.*401 Client Error") as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"tpilite\[hub\]"):
        resolve("owner/model")


def test_the_errors_of_the_real_library_are_those_expected() -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    for name in ("RepositoryNotFoundError", "GatedRepoError", "HfHubHTTPError", "OfflineModeIsEnabled"):
        assert issubclass(getattr(errors, name), OSError), name
    assert not issubclass(errors.HFValidationError, OSError)

"""Models found on the machine, and fetched by name with a stand-in for the Hub's library."""

import fnmatch
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_config, write_checkpoint
from gguf_files import write_gguf

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
    write_checkpoint(here / "mine", tiny_config(qkv_bias=True))
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

    hub.snapshot_download, hub.list_repo_files = download, lambda name: ["config.json"]
    assert resolve("owner/model") == tmp_path
    ((name, patterns),) = asked
    assert name == "owner/model"
    assert {"config.json", "model-*.safetensors", "tokenizer.model"} <= set(patterns)
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in patterns)


def downloads_of(hub: Any, folder: Path, *names: str) -> list[str]:
    """Has a snapshot hold those of the Hub's files that are asked for, and gives what was asked for."""
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        for path in names:
            if any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).unlink(missing_ok=True)
                write_gguf(folder / path, {}, {})
        return str(folder)

    hub.snapshot_download, hub.list_repo_files = download, lambda name: list(names)
    return asked


KINDS = [
    "x-Q4_K_M.gguf",
    "x-Q4_K_S.gguf",
    "x-q8_0.gguf",
    "mmproj-x-F16.gguf",
    "BF16/x-BF16-00001-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Q4_K_M", "x-Q4_K_M.gguf"),
        ("q4_k_s", "x-Q4_K_S.gguf"),
        ("Q8_0", "x-q8_0.gguf"),
        ("bf16", "BF16/x-BF16-00001-of-00002.gguf"),
    ],
)
def test_a_gguf_is_fetched_alone_by_its_kind(hub: Any, kind: str, name: str, tmp_path: Path) -> None:
    asked = downloads_of(hub, tmp_path, *KINDS, "BF16/x-BF16-00002-of-00002.gguf")
    assert is_hub_name(f"owner/model:{kind}")
    assert resolve(f"owner/model:{kind}") == tmp_path / name
    assert asked == ["owner/model"]
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.gguf")}
    assert fetched == {name, name.replace("00001-of", "00002-of")}


@pytest.mark.parametrize("name", ["owner/model", "owner/model:Q5_0", "owner/model:F16"])
def test_a_gguf_that_the_hub_has_not_is_an_error_that_names_those_there(
    hub: Any, name: str, tmp_path: Path
) -> None:
    downloads_of(hub, tmp_path, *KINDS, "README.md")
    expected = r"on the Hugging Face Hub has .*; name one as in .* of these: BF16, Q4_K_M, Q4_K_S, q8_0$"
    with pytest.raises(ConfigError, match=expected):
        resolve(name)


def test_ggufs_are_found_in_the_cache_and_here(tmp_path: Path) -> None:
    cache, here = tmp_path / "cache", tmp_path / "here"
    snapshot = cache / "models--owner--x-GGUF" / "snapshots" / "aaa"
    for path in (
        snapshot / "x-Q4_K_M.gguf",
        snapshot / "BF16" / "x-BF16-00001-of-00002.gguf",
        snapshot / "BF16" / "x-BF16-00002-of-00002.gguf",
        snapshot / "mmproj-x-F16.gguf",
        here / "mine.gguf",
        here / "sub" / "other.gguf",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(path, {}, {})
    (here / "damaged.gguf").write_bytes(b"GG")
    assert find_models(here, cache) == {
        "mine.gguf": here / "mine.gguf",
        "sub/other.gguf": here / "sub" / "other.gguf",
        "owner/x-GGUF:Q4_K_M": snapshot / "x-Q4_K_M.gguf",
        "owner/x-GGUF:BF16": snapshot / "BF16" / "x-BF16-00001-of-00002.gguf",
    }
    assert model_name(here / "mine.gguf") == "mine"


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

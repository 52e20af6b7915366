from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_gguf

from tpilite.errors import CheckpointError
from tpilite.formats.model_files import ModelFiles

WEIGHTS = {"w": ("F32", (2,), np.zeros(2, np.float32))}


def gguf(path: Path, name: str = "a model") -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_gguf(path, WEIGHTS, {"general.name": name})


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    files = ModelFiles.find(tmp_path)
    assert (files.path, files.folder, files.gguf_paths, files.gguf) == (tmp_path, tmp_path, (), None)
    assert (files.name, files.has_weights, files.json("config.json")) == (tmp_path.name, False, None)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert files.json("config.json") == {"a": 1}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        files.json("config.json")
    missing = ModelFiles.find(tmp_path / "none")
    assert (missing.path, missing.has_weights) == (tmp_path / "none", False)


def test_a_gguf_is_named_by_its_path_or_by_a_folder_that_holds_no_other(tmp_path: Path) -> None:
    path = gguf(tmp_path / "Tiny-1B.Q4_K_M.gguf")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "damaged.gguf").write_bytes(b"GG")
    for named in (path, tmp_path):
        files = ModelFiles.find(named)
        assert (files.path, files.folder, files.gguf_paths) == (path, tmp_path, (path,))
        assert (files.name, files.has_weights) == ("Tiny-1B.Q4_K_M", True)
        assert files.gguf is not None
        assert files.gguf["general.name"] == "a model"
        assert files.json("config.json") is None  # which is another model's, for all that is known


def test_safetensors_beside_a_gguf_are_what_a_folder_is_for(tmp_path: Path) -> None:
    gguf(tmp_path / "x.gguf")
    (tmp_path / "model.safetensors").touch()
    assert ModelFiles.find(tmp_path).gguf is None
    assert ModelFiles.find(tmp_path).has_weights


def test_a_folder_of_several_ggufs_is_an_error_that_names_them(tmp_path: Path) -> None:
    gguf(tmp_path / "b.gguf")
    gguf(tmp_path / "a-00001-of-00002.gguf")
    gguf(tmp_path / "a-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF models: a-00001-of-00002.gguf, b.gguf; give"):
        ModelFiles.find(tmp_path)


def test_parts_are_found_from_the_first(tmp_path: Path) -> None:
    paths = [gguf(tmp_path / f"big-{i:05}-of-00003.gguf", str(i)) for i in (1, 2, 3)]
    for named in (tmp_path, paths[0]):
        files = ModelFiles.find(named)
        assert (files.path, files.gguf_paths, files.name) == (paths[0], tuple(paths), "big")
        assert files.gguf is not None
        assert files.gguf["general.name"] == "1"
    with pytest.raises(CheckpointError, match=r"is not the first part .* big-00001-of-00003.gguf"):
        ModelFiles.find(paths[1])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"2 of 3 parts .* lacks big-00002-of-00003.gguf; download"):
        ModelFiles.find(tmp_path)
    paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 parts .* lacks big-00001-of-00003.gguf; download"):
        ModelFiles.find(tmp_path)


@pytest.mark.parametrize("numbers", [(0, 1), None])
def test_parts_are_opened_together(tmp_path: Path, numbers: tuple[int, int] | None) -> None:
    paths = [tmp_path / f"big-{i:05}-of-00002.gguf" for i in (1, 2)]
    for path, number in zip(paths, numbers or (0, 0), strict=True):
        write_gguf(path, WEIGHTS, {"split.no": number, "split.count": 2} if numbers else {})
    files = ModelFiles.find(tmp_path)
    parts = files.open_gguf()
    assert [part.path for part in parts] == paths
    assert files.gguf is parts[0].metadata  # what is read already is not read again
    for part in parts:
        part.close()


@pytest.mark.parametrize(
    ("number", "count", "words"),
    [
        (0, 2, "has split.no = 0 and split.count = 2; expected 1 and 2 by its name: download"),
        (1, 3, "split.count = 3; expected"),
        (np.zeros(9, np.int32), 2, r"split.no = .*; expected 1"),
        (1, 2.0, r"split.count = 2.0; expected"),
    ],
)
def test_a_part_that_says_it_is_another_is_refused(
    tmp_path: Path, number: object, count: object, words: str
) -> None:
    gguf(tmp_path / "big-00001-of-00002.gguf")
    path = tmp_path / "big-00002-of-00002.gguf"
    write_gguf(path, WEIGHTS, {"split.no": number, "split.count": count})
    with pytest.raises(CheckpointError, match=words) as caught:
        ModelFiles.find(tmp_path).open_gguf()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_count_of_parts_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks big-00002-of-99999.gguf"):
        ModelFiles.find(gguf(tmp_path / "big-00001-of-99999.gguf"))
    with pytest.raises(CheckpointError, match="is not the first part of its model"):
        ModelFiles.find(gguf(tmp_path / "big-00003-of-00002.gguf"))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"xxxxxxxx")
    with pytest.raises(CheckpointError, match="is not a folder and no GGUF file; expected one"):
        ModelFiles.find(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "found b''; the file is damaged: download"), (b"version https://git-lfs", "run `git lfs pull`")],
)
def test_what_is_called_a_gguf_and_is_none_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for named in (path, tmp_path):
        with pytest.raises(CheckpointError, match=words):
            _ = ModelFiles.find(named).gguf


def test_what_gives_a_model_its_eyes_is_no_model(tmp_path: Path) -> None:
    gguf(tmp_path / "mmproj-x.gguf")
    assert ModelFiles.find(tmp_path).gguf_paths == ()
    path = gguf(tmp_path / "x.gguf")
    assert ModelFiles.find(tmp_path).path == path


def test_text_is_decoded_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", WEIGHTS, {"general.name": "a", "some.list": ["a", "b"]})
    metadata = ModelFiles.find(path).gguf
    assert metadata is not None
    assert metadata["some.list"] == ["a", "b"]
    assert metadata["some.list"] is metadata["some.list"]

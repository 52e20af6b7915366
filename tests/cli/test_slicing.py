from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite.cli.options import parse
from tpilite.cli.slicing import whole_slice
from tpilite.formats.model_files import ModelFiles
from tpilite.weights.partition import EMBEDDING, LM_HEAD


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_only_rank_holds_a_tied_table_once(is_tied: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tiny_config(tie_word_embeddings=is_tied))
    args = parse(["--model_path", str(folder), "--quantize", "q8_0"])
    for _ in range(2):  # made, then found
        with ExitStack() as stack:
            config, tensors = whole_slice(args, ModelFiles.find(folder), stack)
            assert config.tie_word_embeddings is is_tied
            assert (tensors[EMBEDDING] is tensors[LM_HEAD]) is is_tied
            assert tensors[EMBEDDING].dtype == "Q8_0"
        assert (folder / "split" / "node_0" / "embed.safetensors").exists() is not is_tied

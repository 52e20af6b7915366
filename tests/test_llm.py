"""The Python interface, on a checkpoint with a tokenizer of its own."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint

from tpilite import LLM, SamplingParams
from tpilite.engine import rank
from tpilite.errors import CheckpointError, ConfigError
from tpilite.shipped import find_model

GREEDY = SamplingParams(temperature=0, length=40)


@pytest.fixture(scope="module")
def fable() -> Path:
    return find_model("fable")


def test_a_real_model_gives_its_published_text(shared_models: Path) -> None:
    folder = shared_models / "stories260K"
    with LLM(folder) as llm:
        completion = llm.generate("", SamplingParams(temperature=0, length=199))
    assert completion.text + "\n" == (folder / "expected.txt").read_text()
    assert completion.finish_reason == "length"
    assert len(completion.ids) == 199
    assert completion.stats.prompt_tokens == 1
    assert completion.stats.ttft_s is not None
    assert completion.stats.ttft_s > 0


def test_streamed_pieces_add_up_to_the_text(fable: Path) -> None:
    with LLM(fable) as llm:
        whole = llm.generate("Once upon a time", GREEDY)
        pieces = list(llm.stream("Once upon a time", GREEDY))
        assert "".join(pieces) == whole.text
        assert len(pieces) > 10
        # The continuation keeps the space between the prompt's last word and its own first.
        prompt = llm.tokenizer.encode("Once upon a time")
        assert llm.tokenizer.decode(prompt + whole.ids) == "Once upon a time" + whole.text
        assert llm.generate(prompt, GREEDY).text == whole.text


def test_the_same_seed_gives_the_same_text(fable: Path) -> None:
    with LLM(fable, threads=1) as llm:
        texts = [llm.generate("One day", SamplingParams(seed=s, length=30)).text for s in (1, 1, 2)]
    with LLM(fable, threads=2) as llm:
        texts.append(llm.generate("One day", SamplingParams(seed=1, length=30)).text)
    assert texts[0] == texts[1] == texts[3] != texts[2]


def test_large_seeds_give_texts_of_their_own(fable: Path) -> None:
    seeds = (2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)
    with LLM(fable) as llm:
        texts = {llm.generate("One day", SamplingParams(seed=seed, length=30)).text for seed in seeds}
    assert len(texts) == len(seeds)


def test_a_stop_text_ends_the_text_before_it(fable: Path) -> None:
    with LLM(fable) as llm:
        whole = llm.generate("Once upon a time", GREEDY).text
        stop = whole[20:26]
        cut = llm.generate("Once upon a time", SamplingParams(temperature=0, length=40, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_text_that_ends_by_itself_says_stop(fable: Path) -> None:
    with LLM(fable) as llm:
        completion = llm.generate("Once upon a time", SamplingParams(temperature=0))
    assert completion.finish_reason == "stop"
    assert completion.ids[-1] in llm.config.eos_token_ids


def test_a_prompts_memory_is_returned_when_it_is_read(fable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []
    monkeypatch.setattr(rank, "return_freed_memory", lambda: returned.append(1))
    with LLM(fable) as llm:
        for n, text in enumerate(("Once upon a time", "One day"), start=1):
            llm.generate(text, SamplingParams(temperature=0, length=5))
            assert len(returned) == n


def test_a_folder_without_tokenizer_serves_ids(tmp_path: Path) -> None:
    config = tiny_config()
    with LLM(write_checkpoint(tmp_path, config, "F16")) as llm:
        completion = llm.generate([1, 2, 3], SamplingParams(temperature=0, length=4, ignore_eos=True))
        assert completion.text == ""
        assert len(completion.ids) == 4
        logits = llm.logits([1, 2, 3, *completion.ids])
        assert logits[2:-1].argmax(axis=1).tolist() == completion.ids
        assert logits.dtype == np.float32
        with pytest.raises(ConfigError, match="has no tokenizer"):
            llm.generate("text")
        with pytest.raises(ConfigError, match="stop texts need a tokenizer"):
            llm.generate([1], SamplingParams(stop=("x",)))


def test_a_model_that_is_not_for_chat_says_so(fable: Path) -> None:
    with LLM(fable) as llm, pytest.raises(ConfigError, match="not a chat model"):
        llm.start_chat([{"role": "user", "content": "Hello"}])


def test_a_folder_that_is_none_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing does not exist; expected a model folder"):
        LLM(tmp_path / "nothing")

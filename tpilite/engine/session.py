"""Text in, text out: what a program asks of rank 0, however many ranks there are.

    session = Session(files, config, rank)
    session.open()
    for text in session.stream("Once upon a time", SamplingParams(length=100, seed=1)):
        print(text, end="", flush=True)

Closing the loop early ends the request.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpilite.chat.answers import AnswerReader, AnswerSyntax, Part
from tpilite.chat.format import ChatFormat, chat_format
from tpilite.closing import Closing
from tpilite.config.generation import GenerationDefaults
from tpilite.config.llama import LlamaConfig
from tpilite.engine.engine import Engine, Recover, TooLong
from tpilite.engine.rank import Rank
from tpilite.engine.sampling import SamplingParams, taken_from
from tpilite.engine.sequence import Sequence
from tpilite.engine.stats import Stats, measure
from tpilite.engine.usage import Usage
from tpilite.errors import ConfigError
from tpilite.formats.model_files import ModelFiles
from tpilite.text.load import load_tokenizer
from tpilite.text.templates import find_templates, find_token_names
from tpilite.text.tokenizer import StreamDecoder, Tokenizer

Prompt = str | Items[int]
Objects = Items[Mapping[str, Any]]


@dataclass(frozen=True)
class Completion:
    """A finished text: the new tokens, why it ended ("stop", "length", "cancelled") and what it cost.

    Of an answer, `text` is what it says; what the model thought before that, and the tools that it calls, are
    apart.
    """

    text: str
    ids: list[int]
    finish_reason: str | None
    stats: Stats
    thought: str = ""
    calls: tuple[Part, ...] = ()


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt for the engine: its ids, those that end the text, and the syntax of what answers it.

    What continues a text, and answers nothing, has no syntax.
    """

    ids: list[int]
    eos_ids: frozenset[int]
    syntax: AnswerSyntax | None = None


@dataclass(frozen=True)
class TextFormat:
    """What a model's files say of its texts: tokens, ends, messages, and how tokens are chosen."""

    defaults: GenerationDefaults
    tokenizer: Tokenizer | None  # None: it serves ids alone
    chat: ChatFormat | None  # None: it was not made for chat
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, files: ModelFiles, config: LlamaConfig) -> "TextFormat":
        """Raises `TpiliteError`s for files that are damaged or of a kind that is not known."""
        defaults = GenerationDefaults() if files.gguf_paths else GenerationDefaults.from_folder(files.folder)
        tokenizer = load_tokenizer(files, config.vocab_size)
        if tokenizer is None:
            return cls(defaults, None, None, frozenset(config.eos_token_ids))
        chat = chat_format(tokenizer, find_templates(files, tokenizer.specials), find_token_names(files))
        return cls(defaults, tokenizer, chat, tokenizer.eos_ids.union(config.eos_token_ids))


class Session(Closing):
    """Prompts and messages in, text out, by rank 0 of however many ranks; closed by `with`.

    Several threads may use it, and several streams be open, at once: requests are served in the order in
    which they come. `open` it before the first request. A prompt is a text or a list of token ids; a folder
    without tokenizer files serves ids alone.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: LlamaConfig,
        rank: Rank,
        *,
        text_format: TextFormat | None = None,  # None: what the files say
        recover: Recover | None = None,
    ) -> None:
        self.files, self.config = files, config
        self._rank = rank
        text_format = text_format or TextFormat.of(files, config)
        self.defaults, self.chat_format = text_format.defaults, text_format.chat
        self._tokenizer, self._eos_ids = text_format.tokenizer, text_format.eos_ids
        self.engine = Engine(config, rank, recover=recover)

    def open(self) -> None:
        """Asks every rank how long a text its memory allows: to be called before the first request."""
        self.engine.open()

    def close(self) -> None:
        """Ends every request with an error. From now on there is none."""
        self.engine.close()
        if self.chat_format is not None:
            self.chat_format.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `ConfigError` where its files hold none."""
        if self._tokenizer is None:
            kinds = "tokenizer.ggml.model" if self.files.gguf_paths else "tokenizer.model or tokenizer.json"
            raise ConfigError(
                f"{self.files.path} has no tokenizer ({kinds}): download one that has, or give the prompt as "
                "a list of token ids"
            )
        return self._tokenizer

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """The whole text that follows `prompt`."""
        request = self.prepare(self.encode(prompt), params)
        for _ in self.run(request):
            pass
        return self.completion(request)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text that follows `prompt`, in pieces as it is made. Ending the loop early ends the work."""
        return self.run(self.prepare(self.encode(prompt), params))

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """A text to be continued, as ids."""
        self._check_size(prompt if isinstance(prompt, str) else "")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return EncodedPrompt(ids, self._eos_ids)

    def encode_chat(
        self,
        messages: Objects,
        variables: Mapping[str, Any] | None = None,
        *,
        tools: Objects | None = None,
        documents: Objects | None = None,
        continues: bool = False,
    ) -> EncodedPrompt:
        """A conversation of {"role": ..., "content": ...} messages to be answered, as ids.

        `variables` are set for the model's chat template, which may also offer `tools` and `documents` to the
        model. With `continues` the answer goes on with the last message.
        """
        if self.chat_format is None:
            raise ConfigError(f"{self.files.path} is not a chat model (no chat template); give it a prompt")
        contents = (content for message in messages if isinstance(content := message.get("content"), str))
        self._check_size("".join(map(str.strip, contents)))
        chat_format = self.chat_format.with_variables(variables) if variables else self.chat_format
        prompt = chat_format.encode(messages, tools=tools, documents=documents, continues=continues)
        return EncodedPrompt(prompt.ids, self._eos_ids | chat_format.stop_ids, prompt.syntax)

    def prepare(self, prompt: EncodedPrompt, params: SamplingParams | None = None) -> Sequence:
        """A request that is not in the queue yet. Raises `ConfigError` if it cannot be served."""
        params = self.completed(params or SamplingParams())
        sequence = Sequence(prompt.ids, params, prompt.eos_ids, syntax=prompt.syntax)
        self.engine.check(sequence)
        if self._tokenizer is not None:
            # An answer is a text of its own, a completion goes on from its prompt.
            after = [] if prompt.syntax else prompt.ids
            specials = self._tokenizer.specials
            marks = prompt.syntax.marks if prompt.syntax else ()
            shown = {specials[mark]: mark for mark in marks if mark in specials}
            sequence.decoder = StreamDecoder(self._tokenizer, after, shown)
        elif params.stop:
            raise ConfigError("stop texts need a tokenizer, which this model's folder does not have")
        return sequence

    def completed(self, params: SamplingParams) -> SamplingParams:
        """`params` with what they leave to the model's publisher as its generation_config.json has it."""
        taken: dict[str, Any] = taken_from(self.defaults, params)
        return replace(params, **taken) if taken else params

    def start(self, prompt: Prompt, params: SamplingParams | None = None) -> Sequence:
        """A request for what follows `prompt`, in the queue. Raises `ConfigError` if it cannot be served."""
        return self._submitted(self.prepare(self.encode(prompt), params))

    def start_chat(self, messages: Objects, params: SamplingParams | None = None, **options: Any) -> Sequence:
        """A request for the answer to a conversation, in the queue. Raises as `start` does.

        The options are those of `encode_chat`.
        """
        return self._submitted(self.prepare(self.encode_chat(messages, **options), params))

    def run(self, request: Sequence) -> Iterator[str]:
        """Serves `request` to its end and gives its text in pieces. Raises the error that ended it.

        An answer comes as the model writes it, with the marks around its thought and its calls.
        """
        return (output.text for output in self.engine.run(request) if output.text)

    def completion(self, request: Sequence) -> Completion:
        """What has come of `request` so far. Raises the error that ended it."""
        if request.error is not None:
            raise request.error
        stats = measure(request, self.engine.spent(request))
        reader = AnswerReader(request.syntax or AnswerSyntax())
        parts = reader.add(request.text) + reader.finish()
        return Completion(
            "".join(part.text for part in parts),
            list(request.new_ids),
            request.finish_reason,
            stats,
            "".join(part.thought for part in parts),
            tuple(part for part in parts if part.tool),
        )

    def logits(self, ids: Items[int]) -> NDArray[np.float32]:  # [T] -> [T, V]
        """The scores of the whole vocabulary after each of `ids`."""
        return self.engine.logits(list(ids))

    @property
    def usage(self) -> Usage:
        """What rank 0 has spent and waited for since its start."""
        return self._rank.usage

    @property
    def max_prompt_bytes(self) -> int | None:
        """The bytes beyond which no text fits the context; None where that cannot be told."""
        size = None if self._tokenizer is None else self._tokenizer.max_token_bytes
        return None if size is None else size * self.engine.context

    def _check_size(self, text: str) -> None:
        """Raises `TooLong` for a text that cannot fit, before its ids take many times its memory."""
        limit = self.max_prompt_bytes
        if (
            limit is not None
            and len(text) > limit // 4
            and (size := len(text.encode("utf-8", "replace"))) > limit
        ):
            raise TooLong(-(-size * self.engine.context // limit), None, self.engine.context, False)

    def _submitted(self, sequence: Sequence) -> Sequence:
        self.engine.submit(sequence)
        return sequence

"""How a model's publisher wants its tokens to be chosen."""

from dataclasses import dataclass
from pathlib import Path

from tpilite.checks import short
from tpilite.errors import CheckpointError
from tpilite.formats.json_file import read_json

# The publisher's defaults: our name, that of generation_config.json, and the most that makes sense.
_GENERATION: dict[str, tuple[str, float]] = {
    "temperature": ("temperature", 100),
    "k": ("top_k", 1e9),
    "p": ("top_p", 1),
    "min_p": ("min_p", 1),
    "repetition_penalty": ("repetition_penalty", 100),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """How the model's publisher wants tokens to be chosen; None where generation_config.json says nothing.

    The names are those of `SamplingParams`.
    """

    temperature: float | None = None
    k: int | None = None
    p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationDefaults":
        """The defaults of a model folder. Raises `CheckpointError` for values that make no sense."""
        path = folder / "generation_config.json"
        config = read_json(path) if path.exists() else {}
        found = {name: config.get(key) for name, (key, _) in _GENERATION.items()}
        if found["k"] == -1:  # as other programs say that all count
            found["k"] = 0
        for name, (key, most) in _GENERATION.items():
            value = found[name]
            kinds = (int,) if name == "k" else (int, float)
            least = 0 if name in ("temperature", "k", "min_p") else 1e-6
            if value is not None and not (type(value) in kinds and least <= value <= most):
                raise CheckpointError(
                    f"{path} has {key} = {short(value)}; expected a number from {least:g} to {most:g}"
                )
        if config.get("do_sample") is False:
            found["temperature"] = 0.0
        return cls(**found)

    def given(self) -> dict[str, float]:
        """What the file says, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

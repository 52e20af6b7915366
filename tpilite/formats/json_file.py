"""A JSON object in a file of the model's folder."""

import json
from pathlib import Path
from typing import Any

from tpilite.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model's folder. Raises `CheckpointError`."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a model folder has config.json, *.safetensors and a tokenizer, or a GGUF"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value

"""What the tests of the model share: a trained one."""

import json

import pytest
from safetensors.numpy import load_file
from tiny_model import Tiny


@pytest.fixture(scope="session")
def stories(shared_models):
    """A trained model: its scores are far from random ones."""
    folder = shared_models / "stories260K"
    config = json.loads((folder / "config.json").read_text())
    return Tiny(config, tensors=load_file(folder / "model.safetensors"))

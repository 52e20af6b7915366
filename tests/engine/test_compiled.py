"""The whole program without compiled code: where it is not wanted, cannot be imported or cannot be loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_code import EXCHANGE, PRODUCTS

from tpilite.cluster.sums import new_sums
from tpilite.engine import compiled
from tpilite.native import bindings, products
from tpilite.native.bindings import Unavailable
from tpilite.net import sums

_NODE = [sys.executable, str(Path(__file__).parents[2] / "bin" / "tpilite-node")]
_STORY = ["--model_path", "fable", "--prompt", "Once", "--temperature", "0", "--length", "30"]
# Every process that has this on its path imports it at the start.
_BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["tpilite", "native"]:
            raise ImportError("blocked by a test")

sys.meta_path.insert(0, Blocked())
"""

_LOADERS = [(products, "load"), (bindings, "load_exchange")]
needs_both = pytest.mark.skipif(not (PRODUCTS and EXCHANGE), reason="there is no compiled code here")


def node(*args, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [*_NODE, *args], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["blocked", "switched off"])
def without(request, tmp_path):
    """An environment in which compiled code is not used."""
    if request.param == "switched off":
        return {"TPILITE_NATIVE": "0"}
    (tmp_path / "sitecustomize.py").write_text(_BLOCK)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "TPILITE_NATIVE": ""}


@pytest.mark.parametrize("ranks", [[], ["--local", "2"], ["--local", "3", "--allreduce", "scatter"]])
def test_the_program_writes_the_same_text_without_compiled_code(without, ranks, tmp_path):
    home = {"HOME": str(tmp_path)}
    place = ["--save_dir", str(tmp_path / "split")]
    text = node(*_STORY, *ranks, *place, **home, TPILITE_NATIVE="")
    assert len(text) > 60
    assert node(*_STORY, *ranks, *place, **home, **without) == text


def test_the_version_says_why_numpy_does_everything(without):
    why = "TPILITE_NATIVE is 0" if "PYTHONPATH" not in without else "it cannot be imported: blocked by a test"
    assert node("--version", **without).endswith(f", products by NumPy ({why})\n")


@pytest.fixture
def undecided(monkeypatch):
    """As at the start of a process whose environment says nothing."""
    monkeypatch.delenv("TPILITE_NATIVE", raising=False)
    compiled._decision.cache_clear()
    yield
    compiled._decision.cache_clear()


@needs_both
def test_compiled_code_is_used_where_it_can_be_and_loaded_once(undecided, monkeypatch):
    loaded = []
    for module, name in _LOADERS:
        load = getattr(module, name)
        monkeypatch.setattr(module, name, lambda load=load: loaded.append(1) or load())
    assert compiled.why_not() == ""
    compiled.new_products(1).close()
    compiled.new_products(2).close()
    assert new_sums() is not sums.new_sum
    assert len(loaded) == 2


@pytest.mark.parametrize("broken", _LOADERS)
def test_both_libraries_are_used_or_none(undecided, monkeypatch, broken):
    def load():
        raise Unavailable("it is broken")

    for loader in _LOADERS:
        monkeypatch.setattr(*loader, load if loader is broken else lambda: None)
    assert compiled.new_products(1) is None
    assert new_sums() is sums.new_sum
    assert compiled.why_not() == "it is broken"


def test_a_model_on_one_machine_loads_nothing_of_the_network():
    script = "import sys; from tpilite import LLM; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"socket", "ssl", "msgpack", "tpilite.net"} & {*done.stdout.split()}

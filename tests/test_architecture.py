"""The walls of the package: who may import whom, and that importing does nothing."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = _ROOT / "tpilite"

# The floors of the package, lowest first: folders and the modules beside them import from lower floors only.
# This is the one place that says so.
_FLOORS = [
    "errors version arrays closing dtypes shipped",
    "checks linear formats",
    "config collective machine",
    "model text net quantize",
    "weights native chat",
    "engine export",
    "llm cluster serving",
    "cli __init__",
]
# Inside a folder, each module imports only from those before it: a new module needs its place here.
_INSIDE = {
    "formats": "json_file stored writing safetensors gguf gguf_writer model_files uncached",
    "config": "llama hugging_face gguf generation",
    "linear": "calls packing block_types matrix products plans chunks thread_pool linear",
    "quantize": "groups quantizers recipe",
    "model": "ops kept kv_cache llama",
    "text": "parts added_tokens tokenizer normalizers pretokenizers decoders bpe sentencepiece_files "
    "tiktoken_files json_files gguf_vocab load templates",
    "chat": "answers spelling template_runner template_process format",
    "net": "auth messages wire address channel handshake control exchange codecs sums measure group listener "
    "http body_memory http_server members rendezvous membership",
    "weights": "partition assemble trust content gguf_tensors checkpoint disk slices slicer "
    "residency part_table loader pager",
    "export": "architecture vocabulary gguf_file",
    "native": "bindings products exchange",
    "engine": "compiled config sampling usage sequence scheduler stats step choice runner rank "
    "engine session",
    "cluster": "config token sums slice_protocol catalog slice_server slice_client fetch terms splits clean "
    "host worker",
    "serving": "config errors openai_fields openai_requests openai_responses figures jobs service access "
    "answer page routes server",
    "cli": "streams memory_report local terminal hub configs options clean calibration slicing main __main__",
    "shipped": "",
}
# `local` hands its own environment on to the ranks that it starts; `compiled` asks whether compiled code is
# wanted; `__main__` tells the BLAS its threads.
_MAY_READ_ENVIRONMENT = {"cli.configs", "cli.local", "engine.compiled", "__main__"}
_FILES_AND_SOCKETS = {"mmap", "socket", "ssl", "http", "socketserver", "urllib", "msgpack", "safetensors"}


def _name(path):
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


_TREES = {_name(path): ast.parse(path.read_bytes()) for path in sorted(_PACKAGE.rglob("*.py"))}


def _imported(tree):
    """The dotted names that the imports of a tree bind or pass through, relative ones refused."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _of_ours(tree):
    """The modules of this package that a tree imports, by their names in the table."""
    for dotted in _imported(tree):
        first, *rest = dotted.split(".")
        if first == "tpilite":
            found = [".".join(rest[:n]) for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in _TREES]
            yield found[0] if found else "__init__"


def _in_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from ast.walk(node)


def _reaches(name):
    """The module and all of ours that it imports, directly or not."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += _of_ours(_TREES[module])
    return seen


def _dependencies():
    config = configparser.ConfigParser()
    config.read(_ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    return {line.split(">")[0].split("=")[0].strip() for line in lines}


def _place(name):
    """The folder, or the module beside the folders, that a module belongs to, and its place inside."""
    folder, _, module = ("cli.__main__" if name == "__main__" else name).partition(".")
    inside = ["", *_INSIDE.get(folder, "").split()]
    assert folder in " ".join(_FLOORS).split(), f"{name} has no place in this test's table of floors"
    assert module in inside, f"{name} has no place in this test's order of its folder"
    return folder, inside.index(module)


def _floor(folder):
    return next(floor for floor, row in enumerate(_FLOORS) if folder in row.split())


@pytest.mark.parametrize("name", _TREES)
def test_imports_point_down(name):
    folder, place = _place(name)
    for other in _of_ours(_TREES[name]):
        other_folder, other_place = _place(other)
        if other_folder == folder:
            assert other_place < place, f"{other} comes after {name} in its folder"
        else:
            assert _floor(other_folder) < _floor(folder), f"{name} is not above {other}"


# What each folder, and each module beside them, imports of the others.
_IMPORTED_BY = {folder: set() for row in _FLOORS for folder in row.split()}
for _module, _tree in _TREES.items():
    _IMPORTED_BY[_place(_module)[0]] |= {_place(other)[0] for other in _of_ours(_tree)} - {_place(_module)[0]}


def _below(folder):
    """Everything that a folder stands on."""
    return _IMPORTED_BY[folder].union(*map(_below, _IMPORTED_BY[folder]))


def test_the_house_has_at_most_eight_floors():
    def height(folder):
        return 1 + max(map(height, _IMPORTED_BY[folder]), default=0)

    heights = {folder: height(folder) for folder in _IMPORTED_BY}
    assert max(heights.values()) <= 8, f"{max(heights.values())} floors: {heights}"


@pytest.mark.parametrize("folder", _INSIDE)
def test_a_folder_says_what_it_is(folder):
    """Its docstring says where to begin, what it may import (as the table has it) and must never know."""
    text = ast.get_docstring(_TREES[folder]) or ""
    about, _, rest = text.partition("\n\nBegin with ")
    begin, _, rest = rest.partition("\nMay import: ")
    may_import, _, never = rest.partition("\nMust never ")
    assert about, "a first line about the folder, then: Begin with ..."
    assert never, "then two lines: May import: ...; Must never know: ..."
    missing = [name for name in re.findall(r"`(\w+\.py)`", begin) if not (_PACKAGE / folder / name).exists()]
    assert missing == [], "files to begin with that do not exist"
    if may_import == "everything.":
        return
    named = re.findall(r"`(\w+)`", may_import)
    assert [other for other in named if _floor(other) >= _floor(folder)] == [], "not below this folder"
    allowed = (
        set(named).union(*map(_below, named)) if re.search("what (it|they) stand", may_import) else set(named)
    )
    assert _IMPORTED_BY[folder] <= allowed


def test_compiled_code_is_imported_at_one_place_where_it_may_be_missing():
    found = {name for name, tree in _TREES.items() if any(o.startswith("native") for o in _of_ours(tree))}
    assert {name for name in found if not name.startswith("native")} == {"engine.compiled", "cluster.sums"}


def test_the_network_stands_on_little():
    for name in _TREES:
        if name.split(".")[0] == "net":
            found = {other.split(".")[0] for other in _reaches(name)}
            assert found <= {"net", "errors", "arrays", "closing", "collective"}, name


def test_the_maths_knows_nothing_of_files_and_sockets():
    for name in _reaches("model.llama"):
        outside = {dotted.split(".")[0] for dotted in _imported(_TREES[name])}
        assert not outside & _FILES_AND_SOCKETS, name
        attributes = {node.attr for node in ast.walk(_TREES[name]) if isinstance(node, ast.Attribute)}
        assert not attributes & {"memmap", "fromfile"}, name


@pytest.mark.parametrize("name", _TREES)
def test_optional_dependencies_alone_are_imported_inside_functions(name):
    tree, required = _TREES[name], _dependencies() | sys.stdlib_module_names | {"tpilite"}
    inside = {dotted.split(".")[0] for node in _in_functions(tree) for dotted in _imported_by(node)}
    everywhere = {dotted.split(".")[0] for dotted in _imported(tree)}
    assert not inside & required, "only what may be missing is imported inside a function"
    assert not everywhere - inside - required, "what may be missing is imported where it is needed"


def _imported_by(node):
    return _imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else ()


@pytest.mark.parametrize("name", _TREES)
def test_nothing_is_unpickled_or_evaluated(name):
    outside = {dotted.split(".")[0] for dotted in _imported(_TREES[name])}
    assert not outside & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    calls = [node.func for node in ast.walk(_TREES[name]) if isinstance(node, ast.Call)]
    assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"eval", "exec", "__import__"}


@pytest.mark.parametrize("name", sorted(_TREES.keys() - _MAY_READ_ENVIRONMENT))
def test_the_environment_is_read_by_the_command_line_alone(name):
    nodes = list(ast.walk(_TREES[name]))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {dotted.rpartition(".")[2] for dotted in _imported(_TREES[name])}
    assert not names & {"environ", "environb", "getenv", "getenvb"}


# Run in a process of its own with the names of all modules: what importing each of them does beyond
# reading source. Other packages are imported first, since what they do is not ours.
_WATCH = r"""
import importlib, logging, os, signal, sys, threading, warnings

package, others, modules = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
for other in others:
    try:
        importlib.import_module(other)
    except ImportError:
        pass

found = []
read = os._Environ.__getitem__

def watched_read(self, key):
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in ("os", "collections.abc"):
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(package):
        found.append(f"reads {key} from the environment")
    return read(self, key)

def audit(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.putenv")):
        found.append(f"raises {event}{args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        found.append(f"opens {args[0]} for writing")

def _is_set_up(logger):
    return logger.handlers or logger.level not in (logging.NOTSET, logging.WARNING)

def state():
    names = [name for name in logging.root.manager.loggerDict if name.startswith("tpilite")]
    loggers = [logging.root, *map(logging.getLogger, names)]
    return {
        "threads": list(threading.enumerate()),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "logging": [(logger.level, list(logger.handlers)) for logger in loggers if _is_set_up(logger)],
        "warning filters": list(warnings.filters),
        "the working directory": os.getcwd(),
        "the environment": dict(os.environ),
    }

os._Environ.__getitem__ = watched_read
sys.addaudithook(audit)
for module in modules:
    before = state()
    start = len(found)
    importlib.import_module(module)
    after = state()
    for what in before:
        if before[what] != after[what]:
            found.append(f"changes {what}")
    for line in found[start:]:
        print(module, line)
"""


def test_importing_does_nothing():
    names = sorted(_TREES.keys() - {"__init__", "__main__"}, key=lambda name: (_floor(_place(name)[0]), name))
    others = {dotted for tree in _TREES.values() for dotted in _imported(tree)}
    others |= {dotted.rpartition(".")[0] or dotted for dotted in others}
    result = subprocess.run(
        [
            sys.executable,
            "-B",
            "-c",
            _WATCH,
            str(_PACKAGE),
            " ".join(sorted(other for other in others if other.split(".")[0] != "tpilite")),
            " ".join(f"tpilite.{name}" for name in names),
        ],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == ""
    assert result.returncode == 0, result.stderr

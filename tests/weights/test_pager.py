"""Paging against weights in memory: the same bits, the bytes that may be read, the memory that may be used.

The reference is the same model on memory maps; the bytes are those that the files' readers are asked for.
"""

import csv
import errno
import json
import math
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config, write_checkpoint
from packed_rows import widened

from tpilite.cli.memory_report import MemoryReport, paging_columns
from tpilite.collective import Solo
from tpilite.engine.usage import Usage
from tpilite.errors import CheckpointError, ConfigError
from tpilite.formats import uncached
from tpilite.formats.stored import StoredTensor
from tpilite.formats.uncached import UncachedFile
from tpilite.linear import calls
from tpilite.linear.linear import Linear
from tpilite.linear.matrix import as_float32
from tpilite.linear.packing import Packed
from tpilite.model.llama import Llama, Segment
from tpilite.weights import loader as loader_module
from tpilite.weights import pager as pager_module
from tpilite.weights.assemble import Embedding, assemble, mapped
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.pager import Pager
from tpilite.weights.partition import EMBEDDING, LM_HEAD
from tpilite.weights.residency import PagedPart

# Wide enough that a matrix is several of the multiplication's blocks, with sizes that do not divide evenly.
_CONFIG = tiny_config(hidden_size=512, intermediate_size=1100, head_dim=64, vocab_size=1500)
_PART = 150_000
_PROMPTS = ([1, 5, 9, 13, 2], [7], [3], [8])
_LONG_S = 60  # only a deadlock idles for so long


@pytest.fixture(autouse=True)
def spare(monkeypatch):
    """What the machine can spare: nothing, where a test does not say otherwise."""
    found = [0]
    monkeypatch.setattr(pager_module, "spare_bytes", lambda: found[0])
    # Parts of a small model, as small as they are beside a large one.
    monkeypatch.setattr(calls, "_MANY_BYTES", 1 << 19)
    # Nor does a slow machine make parts come out of their packing.
    monkeypatch.setattr(pager_module, "_SHORTEST_MEASURED_S", math.inf)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "bf16", _CONFIG, shards=2)


@pytest.fixture
def checkpoint(folder):
    with Checkpoint(folder) as opened:
        yield opened


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the checkpoint's files that a test may damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with Checkpoint(tmp_path) as opened:
        yield opened


@contextmanager
def paged(checkpoint, **options):
    """A pager and the model on its weights; without options the model on memory maps.

    Resident parts are packed where a test asks for it: what they take can be told in advance only else.
    """
    with ExitStack() as stack:
        linear = stack.enter_context(Linear(2))
        options = {"part_bytes": _PART, "base_bytes": 0, "max_rows": 5, "may_pack": False} | options
        pager = stack.enter_context(Pager(checkpoint.tensors, checkpoint.config, **options))
        pager.start()
        yield pager, Llama(checkpoint.config, pager.weights, Solo(), linear)
    assert not any(thread.name.startswith("pager") for thread in threading.enumerate())


def logits(checkpoint, model, prompts=_PROMPTS, before=lambda i, ids: None, wants=lambda i: True):
    """The scores after each prompt's last row, the prompts following each other in one sequence."""
    embed, cache, scores = Embedding(checkpoint.tensors[EMBEDDING]), model.new_cache(), []
    for i, ids in enumerate(prompts):
        before(i, ids)
        hidden = model.forward(embed(ids), [Segment(cache, len(ids))])
        if wants(i):
            scores.append(model.logits(hidden[-1:]))
    return np.concatenate(scores)


def reference(checkpoint, **options):
    weights = assemble(checkpoint.tensors, checkpoint.config.num_hidden_layers, mapped)
    with Linear(2) as linear:
        return logits(checkpoint, Llama(checkpoint.config, weights, Solo(), linear), **options)


def parts_of(pager):
    """All parts in the order of use."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    matrices = [getattr(layer, name) for layer in pager.weights.layers for name in names]
    return [part for matrix in (*matrices, pager.weights.lm_head) for part in matrix.parts]


def size_of(parts):
    return sum(part.tensor.nbytes for part in parts)


def budget(checkpoint, share, **options):
    """A budget that leaves `share` of the weights for what is resident, or more where the window is small."""
    huge = 1 << 40
    with paged(checkpoint, budget_bytes=huge, **options) as (pager, _):
        return huge - pager.cache_room_bytes + int(share * sum(p.buffer_bytes for p in parts_of(pager)))


@pytest.fixture
def reads(monkeypatch):
    """Every range that a reader is asked for, in order, as (file name, offset, size)."""
    found, read = [], UncachedFile.read

    def recorded(self, buffer, offset, n_bytes):
        found.append((self._file.path.name, offset, n_bytes))
        return read(self, buffer, offset, n_bytes)

    monkeypatch.setattr(UncachedFile, "read", recorded)
    return found


def range_of(part):
    return (part.tensor.file.path.name, part.tensor.offset, part.tensor.nbytes)


def within(work):
    """What `work` gives or raises, or a failure where it hangs, which is to idle for `_LONG_S`."""
    outcome = []

    def run():
        try:
            outcome.append((work(), None))
        except BaseException as error:  # raised again below
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    spent_s = -math.inf
    # Not by the clock alone: a slow machine works all the time.
    while not outcome and time.process_time() > spent_s + _LONG_S / 10:
        spent_s = time.process_time()
        thread.join(_LONG_S)
    assert outcome, "this hangs"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def wait_until(condition):
    def poll():
        while not condition():
            threading.Event().wait(0.001)

    within(poll)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("options", [{"window": 2}, {"window": 5}, {"share": 0.4}, {"share": 2.0}])
@pytest.mark.parametrize("packs", [True, False])
def test_the_bits_do_not_depend_on_paging(tmp_path, dtype, options, packs):
    config = tiny_config(hidden_size=512, intermediate_size=1100, head_dim=64, vocab_size=1500)
    with Checkpoint(write_checkpoint(tmp_path, config, dtype)) as checkpoint:
        if "share" in options:
            options = {"budget_bytes": budget(checkpoint, options["share"])}
        with paged(checkpoint, may_pack=packs, **options) as (pager, model):
            assert any(len(layer.up_proj.parts) > 2 for layer in pager.weights.layers)
            found = within(
                lambda: logits(checkpoint, model, before=lambda i, ids: pager.begin_pass(len(ids)))
            )
        np.testing.assert_array_equal(found, reference(checkpoint))


@pytest.mark.parametrize("method", uncached.READ_METHODS)
def test_the_bits_do_not_depend_on_the_method_of_reading(checkpoint, method):
    try:
        UncachedFile(next(iter(checkpoint.tensors.values())).file, method).close()
    except CheckpointError as error:
        pytest.skip(str(error))
    with paged(checkpoint, window=3, read_method=method) as (_, model):
        np.testing.assert_array_equal(within(lambda: logits(checkpoint, model)), reference(checkpoint))


def test_a_system_without_linuxs_calls(checkpoint, monkeypatch):
    expected, size = reference(checkpoint), budget(checkpoint, 0.5)
    for module, name in (
        (os, "O_DIRECT"),
        (os, "posix_fadvise"),
        (mmap, "MADV_HUGEPAGE"),
        (mmap, "MADV_DONTNEED"),
    ):
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(uncached, "_F_NOCACHE", None)
    with paged(checkpoint, budget_bytes=size) as (pager, model):
        np.testing.assert_array_equal(within(lambda: logits(checkpoint, model)), expected)
        assert pager.usage().resident_bytes > 0
        assert pager.usage().streaming_bytes > 0


def test_what_is_paged_is_not_touched_through_a_map(checkpoint, monkeypatch):
    """What a touch maps around a norm, of a file in the page cache, counts as the process's memory."""
    expected = reference(checkpoint)

    def never(tensor):
        raise AssertionError(f"{tensor.name} is mapped")

    monkeypatch.setattr(StoredTensor, "array", never)
    with paged(checkpoint, window=2) as (_, model):
        assert np.array_equal(logits(checkpoint, model), expected)


def test_tied_embeddings_and_biases(tmp_path):
    config = tiny_config(
        hidden_size=512, vocab_size=1500, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    )
    with Checkpoint(write_checkpoint(tmp_path, config)) as checkpoint:
        with paged(checkpoint, window=2) as (_, model):
            found = within(lambda: logits(checkpoint, model))
        np.testing.assert_array_equal(found, reference(checkpoint))


def test_a_rank_without_heads(checkpoint):
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name] = tensor.rows(0, 0)
    with Pager(tensors, checkpoint.config, window=2) as pager:
        pager.start()
        assert pager.weights.layers[0].q_proj.n_rows == 0
        with within(pager.weights.layers[0].up_proj.parts[0].open) as rows:
            assert rows.shape[1] == 512


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("packs", [True, False])
def test_each_pass_reads_what_is_not_resident_once(checkpoint, share, packs, reads):
    # With larger passes to come, parts would return before the first one, which may have been read by then.
    rows = {"max_rows": 1}
    room = budget(checkpoint, share, **rows)
    with paged(checkpoint, budget_bytes=room, may_pack=packs, **rows) as (pager, model):
        total = size_of(parts_of(pager))
        marks = []

        def before(i, ids):
            pager.begin_pass(len(ids))
            marks.append(pager.usage())

        within(lambda: logits(checkpoint, model, [[1], *([i] for i in range(10))], before))
        usage = pager.usage()
        assert usage.resident_bytes + usage.streaming_bytes == total
        assert abs(usage.kept_bytes - share * total) < 0.15 * total
        assert usage.loaded_bytes <= usage.kept_bytes
        if packs:  # into three quarters, and a few of a thousand beside
            assert 0.75 * usage.resident_bytes <= usage.kept_bytes <= 0.78 * usage.resident_bytes
        # From the start of one pass to that of another, the window is as full at both in the long run.
        read = marks[-1].read_bytes - marks[2].read_bytes
        n_passes = len(marks) - 3
        assert read <= 1.05 * n_passes * usage.streaming_bytes + usage.window_bytes
    assert sum(n_bytes for *_, n_bytes in reads) == pager.usage().read_bytes
    resident = {range_of(part) for part in parts_of(pager) if part.resident}
    again = [found for found in reads if found in resident]
    assert len(again) == len(set(again)), "what is resident is read once"


@pytest.mark.parametrize(("times", "cached"), [(3.9, False), (4.1, True), (None, False)])
def test_the_page_cache_is_used_where_it_has_room_for_all(checkpoint, spare, times, cached, monkeypatch):
    methods, opened = set(), uncached._OPEN["plain"]
    monkeypatch.setitem(uncached._OPEN, "plain", lambda file: methods.add("plain") or opened(file))
    matrices = [t for name, t in checkpoint.tensors.items() if len(t.shape) == 2 and name != EMBEDDING]
    spare[0] = None if times is None else int(times * sum(tensor.nbytes for tensor in matrices))
    with paged(checkpoint, window=2) as (_, model):
        within(lambda: logits(checkpoint, model))
    assert (methods == {"plain"}) == cached
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.5), may_pack=True) as (pager, _):
        assert (pager.usage().kept_bytes >= pager.usage().resident_bytes) == cached


def test_what_does_not_fit_as_it_is_may_fit_packed(checkpoint, reads):
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.79), may_pack=True) as (pager, model):
        found = within(lambda: logits(checkpoint, model, before=lambda i, ids: pager.begin_pass(len(ids))))
        usage = pager.usage()
        assert usage.resident_bytes == size_of(parts_of(pager))
        assert usage.streaming_bytes == 0
        assert f"(packed into {usage.kept_bytes / 1e6:.0f} MB)" in str(usage)
        assert all(isinstance(part.array, Packed) for part in parts_of(pager))
    assert len(reads) == len(set(reads)) == len(parts_of(pager))
    np.testing.assert_array_equal(found, reference(checkpoint))


def test_parts_that_cannot_be_packed_stream_until_there_is_room_for_them(checkpoint, monkeypatch):
    """As many are evicted as do not fit unpacked, in a budget that is never exceeded."""
    tried = []
    monkeypatch.setattr(loader_module, "pack", lambda rows, memory: tried.append(rows.ctypes.data))
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.5), may_pack=True) as (pager, model):
        resident = []

        def before(i, ids):
            pager.begin_pass(len(ids))
            resident.append(sum(part.kept_bytes for part in parts_of(pager) if part.resident))

        found = within(lambda: logits(checkpoint, model, [[i] for i in range(8)], before))
        total = size_of(parts_of(pager))
        assert max(resident) <= 0.65 * total
        assert resident[-1] >= 0.35 * total
        assert pager.usage().kept_bytes >= pager.usage().resident_bytes
        assert len(tried) <= len(parts_of(pager)), "each but once"
    np.testing.assert_array_equal(found, reference(checkpoint, prompts=[[i] for i in range(8)]))


@pytest.mark.parametrize(("idle_share", "unpacks"), [(-1e9, True), (1e9, False)])
def test_where_the_disk_idles_parts_are_unpacked_by_and_by(checkpoint, monkeypatch, idle_share, unpacks):
    monkeypatch.setattr(pager_module, "_SHORTEST_MEASURED_S", 0.0)
    monkeypatch.setattr(pager_module, "_IDLE_SHARE", idle_share)
    prompts = [[1, 2, 3], *([i] for i in range(60))]
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.5), may_pack=True) as (pager, model):
        packed, kept = [], []

        def before(i, ids):
            pager.begin_pass(len(ids))
            packed.append(sum(part.may_pack for part in parts_of(pager) if part.resident))
            kept.append(pager.usage().kept_bytes)

        found = within(lambda: logits(checkpoint, model, prompts, before))
        assert packed[0] == packed[1], "the first pass tells nothing"
        assert packed == sorted(packed, reverse=True)
        assert min(np.diff(packed)) >= -1 - len(parts_of(pager)) / 8
        assert (packed[-1] == 0) == unpacks
        assert max(kept) <= kept[0] + max(part.buffer_bytes for part in parts_of(pager))
        assert kept[-1] >= 0.9 * kept[0]
    np.testing.assert_array_equal(found, reference(checkpoint, prompts=prompts))


def test_what_was_mapped_stays_so_while_the_disk_idles(checkpoint, monkeypatch):
    monkeypatch.setattr(pager_module, "_SHORTEST_MEASURED_S", 0.0)
    monkeypatch.setattr(pager_module, "_IDLE_SHARE", -1e9)
    with paged(checkpoint, budget_bytes=budget(checkpoint, 2.0), may_pack=True) as (pager, model):
        cache_bytes = pager.cache_room_bytes - size_of(parts_of(pager)) // 2
        arrays = []

        def before(i, ids):
            pager.begin_pass(len(ids), cache_bytes)
            arrays.append([part.array for part in parts_of(pager)])

        prompts = [[i] for i in range(20)]
        found = within(lambda: logits(checkpoint, model, prompts, before))
        # A part that was evicted may be back by then, packed.
        mapped_at_first = [
            i for i, array in enumerate(arrays[0]) if not (array is None or isinstance(array, Packed))
        ]
        assert 0 < len(mapped_at_first) < len(arrays[0])
        assert all(later[i] is arrays[0][i] for later in arrays for i in mapped_at_first)
    np.testing.assert_array_equal(found, reference(checkpoint, prompts=prompts))


def test_parts_are_read_in_the_order_of_use_and_across_the_passes_end(checkpoint, reads):
    with paged(checkpoint, window=2) as (pager, model):
        parts = parts_of(pager)
        within(lambda: logits(checkpoint, model, [[1], [2]]))
        # Nothing is asked for any more; the window fills with the beginning of a third pass.
        wait_until(lambda: len(reads) == 2 * len(parts) + 2)
        assert reads == [range_of(part) for part in [*parts, *parts, *parts[:2]]]
        assert pager.usage().passes == 0
        assert pager.usage().loads in (len(reads) - 1, len(reads))


@pytest.mark.parametrize("window", [2, 3])
def test_no_more_than_the_window_is_in_memory(checkpoint, window, monkeypatch):
    begun, released, most = [], [], []
    read, opened = UncachedFile.read, PagedPart.open

    def counted_read(self, buffer, offset, n_bytes):
        begun.append(offset)
        most.append(len(begun) - len(released))
        return read(self, buffer, offset, n_bytes)

    @contextmanager
    def counted_open(self):
        try:
            with opened(self) as rows:
                yield rows
                released.append(self)
        finally:
            pass

    monkeypatch.setattr(UncachedFile, "read", counted_read)
    monkeypatch.setattr(PagedPart, "open", counted_open)
    with paged(checkpoint, window=window) as (pager, model):
        within(lambda: logits(checkpoint, model))
        usage = pager.usage()
        assert usage.resident_bytes == 0
        assert usage.filled_bytes <= usage.window_bytes
        assert usage.window_bytes == window * max(part.buffer_bytes for part in parts_of(pager))
    assert max(most) == window


def test_resident_parts_lie_evenly_among_streaming_ones(checkpoint):
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.4), part_bytes=1) as (pager, _):
        parts = parts_of(pager)
        share = size_of(p for p in parts if p.resident) / size_of(parts)
        largest = max(part.tensor.nbytes for part in parts)
        assert 0.3 < share < 0.5
        for n in range(len(parts)):
            resident = size_of(part for part in parts[:n] if part.resident)
            assert abs(resident - share * size_of(parts[:n])) < 2 * largest


def test_a_pass_that_wants_no_scores_reads_no_lm_head(checkpoint, reads):
    def wants(i):
        return i == 3

    with paged(checkpoint, window=2) as (pager, model):
        head = {range_of(part) for part in pager.weights.lm_head.parts}
        found = within(
            lambda: logits(
                checkpoint, model, before=lambda i, _: pager.begin_pass(scores=wants(i)), wants=wants
            )
        )
        n_head = len([found for found in reads if found in head])
        assert len(reads) <= len(_PROMPTS) * len(parts_of(pager)) - 3 * len(head) + 2
        assert n_head == len(head)
    np.testing.assert_array_equal(found, reference(checkpoint, wants=wants))


def test_lm_head_may_be_left_out_or_used_unannounced(checkpoint):
    def wants(i):
        return i % 2 == 1

    with paged(checkpoint, window=3) as (pager, model):
        found = within(
            lambda: logits(
                checkpoint, model, before=lambda i, _: pager.begin_pass(scores=not wants(i)), wants=wants
            )
        )
    np.testing.assert_array_equal(found, reference(checkpoint, wants=wants))


@pytest.mark.parametrize("packs", [True, False])
def test_any_order_gives_the_right_rows(checkpoint, packs):
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.3), may_pack=packs) as (pager, _):
        parts = parts_of(pager)
        order = [*np.random.default_rng(0).permutation(len(parts)), 0, 0, len(parts) - 1, 1]

        def walk():
            for i in order:
                with parts[i].open() as rows:
                    stored = parts[i].tensor.array()
                    if isinstance(rows, Packed):
                        assert packs
                        rows, stored = widened(rows, 0, len(stored)), as_float32(stored)
                    else:
                        assert not rows.flags.writeable
                    np.testing.assert_array_equal(rows.view(np.uint16), stored.view(np.uint16))

        within(walk)


def test_a_time_line_of_what_is_in_memory(checkpoint, tmp_path):
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.5)) as (pager, model):
        with MemoryReport(
            tmp_path / "memory.csv", lambda: paging_columns(Usage(paging=pager.usage())), interval_s=0.001
        ):
            within(lambda: logits(checkpoint, model))
            pager.begin_pass(cache_bytes=12345)
            usage = pager.usage()
        wait_until(lambda: pager.usage().filled_bytes == usage.window_bytes)
        rows = list(csv.DictReader((tmp_path / "memory.csv").read_text().splitlines()))
    assert max(int(row["resident_bytes"]) for row in rows) == usage.resident_bytes == usage.loaded_bytes
    assert max(int(row["window_bytes"]) for row in rows) <= usage.window_bytes
    assert int(rows[-1]["cache_bytes"]) == 12345
    assert 0 < int(rows[-1]["loads"]) <= pager.usage().loads
    assert 0 < int(rows[-1]["read_bytes"]) <= pager.usage().read_bytes


@pytest.mark.parametrize("evicts", [False, True])
def test_a_part_that_is_opened_while_it_is_read_for_something_else(checkpoint, monkeypatch, evicts):
    """Its load was given up for another order of use, or it was evicted while it was read: its rows come."""
    reading, go_on, read = threading.Event(), threading.Event(), UncachedFile.read
    held = []

    def hold_one(self, buffer, offset, n_bytes):
        if held and offset == held[0].tensor.offset and not reading.is_set():
            reading.set()
            assert go_on.wait(_LONG_S)
        return read(self, buffer, offset, n_bytes)

    monkeypatch.setattr(UncachedFile, "read", hold_one)
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.5)) as (pager, _):
        parts = parts_of(pager)
        held.append(next(part for part in parts[10:] if part.resident))

        def walk():
            for part in parts[: held[0].index]:
                with part.open():
                    pass
            assert reading.wait(_LONG_S)
            if evicts:
                pager.begin_pass(cache_bytes=pager.cache_room_bytes)
                assert not held[0].resident
            else:
                with next(part for part in parts[-5:] if not part.resident).open():
                    pass
            threading.Timer(0.3, go_on.set).start()
            with held[0].open() as rows:
                np.testing.assert_array_equal(rows, held[0].tensor.array())

        within(walk)


def test_two_parts_are_not_open_at_once(checkpoint):
    with paged(checkpoint, window=3) as (pager, _):
        first, second = parts_of(pager)[:2]
        with first.open(), pytest.raises(AssertionError, match="one part is open at a time"):
            with second.open():
                pass
        with within(second.open):
            pass


def test_everything_that_fits_is_mapped(checkpoint, reads):
    for options in ({}, {"budget_bytes": budget(checkpoint, 2.0)}):
        with paged(checkpoint, **options) as (pager, model):
            pager.begin_pass()
            logits(checkpoint, model)
            assert not any(thread.name.startswith("pager") for thread in threading.enumerate())
            usage = pager.usage()
            assert usage.resident_bytes == size_of(parts_of(pager))
            assert usage.streaming_bytes == usage.window_bytes == usage.read_bytes == 0
            tensor = checkpoint.tensors[LM_HEAD]
            assert np.shares_memory(pager.weights.lm_head.parts[0].array, tensor.array())
    assert reads == []


def test_a_budget_that_is_too_small_says_what_is_needed(checkpoint):
    with pytest.raises(
        ConfigError, match=r"budget of 10 MB is too small: at least \d+ MB are needed"
    ) as caught:
        with paged(checkpoint, budget_bytes=10_000_000):
            pass
    said = int(re.search(r"at least (\d+) MB", str(caught.value))[1]) * 1_000_000
    with paged(checkpoint, budget_bytes=said + 500_000) as (pager, _):
        assert pager.usage().window_bytes == 2 * max(part.buffer_bytes for part in parts_of(pager))
    with pytest.raises(ConfigError, match="is too small"):
        with paged(checkpoint, budget_bytes=said - 500_000):
            pass
    with pytest.raises(ConfigError, match="300 MB for the program"):
        with paged(checkpoint, budget_bytes=said, base_bytes=300_000_000):
            pass


@pytest.mark.parametrize("window", [1, 0, -1, 2.0, True])
def test_a_window_below_two_blocks(checkpoint, window):
    with pytest.raises(ConfigError, match="must be at least 2 blocks"):
        Pager(checkpoint.tensors, checkpoint.config, window=window)


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.parametrize("packs", [True, False])
def test_resident_parts_are_evicted_for_the_caches_and_return(checkpoint, share, packs):
    steps = (0, 1_000_000, 2_000_000, None, 1_500_000, 0)
    with paged(checkpoint, budget_bytes=budget(checkpoint, share), may_pack=packs) as (pager, model):
        limit = pager.cache_room_bytes
        resident, stored, largest = [], [], max(part.tensor.nbytes for part in parts_of(pager))

        def before(i, ids):
            pager.begin_pass(len(ids), limit if steps[i] is None else steps[i])
            resident.append(pager.usage().kept_bytes)
            stored.append(pager.usage().resident_bytes)

        prompts = [[i] for i in range(len(steps))]
        found = within(lambda: logits(checkpoint, model, prompts, before))
        assert pager.usage().cache_bytes == 0
    np.testing.assert_array_equal(found, reference(checkpoint, prompts=prompts))
    if share < 1:
        for n_bytes, kept in zip(steps, resident, strict=True):
            if n_bytes is not None:
                given = resident[0] - kept
                assert n_bytes - 1e-9 <= given + largest
                assert given <= n_bytes + largest
    assert resident[3] == 0
    # Once there is a window, it stays.
    assert stored[-1] == stored[0] or (share > 1 and stored[-1] >= 0.9 * stored[0])


def test_resident_parts_are_evicted_evenly(checkpoint):
    with paged(checkpoint, budget_bytes=budget(checkpoint, 2.0)) as (pager, _):
        parts = parts_of(pager)
        pager.begin_pass(cache_bytes=pager.cache_room_bytes - size_of(parts) // 2)
        resident = [part.resident for part in parts]
        longest = max(len(run) for run in "".join(".#"[r] for r in resident).split("."))
        assert 0.3 < sum(resident) / len(parts) < 0.6
        assert longest <= 3


def test_caches_that_do_not_fit_are_refused_and_all_else_goes_on(checkpoint):
    with paged(checkpoint, budget_bytes=budget(checkpoint, 0.5)) as (pager, model):
        pager.begin_pass()
        before = pager.usage()
        with pytest.raises(ConfigError, match=r"too small: at least \d+ MB are needed"):
            pager.begin_pass(5, pager.cache_room_bytes + 1)
        assert pager.usage().resident_bytes == before.resident_bytes
        assert pager.usage().cache_bytes == 0
        np.testing.assert_array_equal(within(lambda: logits(checkpoint, model)), reference(checkpoint))


def test_more_rows_take_room_as_well(checkpoint):
    size = budget(checkpoint, 0.5, max_rows=300)
    with paged(checkpoint, budget_bytes=size, max_rows=300) as (pager, _):
        pager.begin_pass(1)
        one = pager.usage().resident_bytes
        pager.begin_pass(300)
        many = pager.usage().resident_bytes
        pager.begin_pass(1)
        assert many < one == pager.usage().resident_bytes


def test_a_program_that_grows_takes_the_room(checkpoint, monkeypatch):
    size = budget(checkpoint, 0.5)
    rss = [0]
    monkeypatch.setattr("tpilite.weights.pager.rss_bytes", lambda: rss[0])
    with paged(checkpoint, budget_bytes=size, base_bytes=None) as (pager, _):
        pager.begin_pass()
        before = pager.usage().resident_bytes
        rss[0] = size
        pager.begin_pass()
        assert pager.usage().resident_bytes < before


@pytest.mark.parametrize("options", [{}, {"window": 2}])
def test_a_file_truncated_between_passes(own, options):
    with paged(own, **options) as (pager, model):
        pager.begin_pass()
        within(lambda: logits(own, model, [[1]]))
        for path in own.path.glob("*.safetensors"):
            os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="was truncated while it was in use"):
            pager.begin_pass()


@pytest.mark.parametrize("method", [None, "plain"])
def test_a_file_truncated_within_a_pass(own, method):
    with paged(own, window=2, read_method=method) as (pager, model):
        pager.begin_pass()
        for path in own.path.glob("*.safetensors"):
            os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(CheckpointError, match="was truncated while it was in use"):
            within(lambda: logits(own, model))


def test_a_file_deleted_under_it_is_read_on(own):
    expected = reference(own)
    with paged(own, window=2) as (pager, model):
        within(lambda: logits(own, model, [[1]]))
        for path in own.path.glob("*.safetensors"):
            path.unlink()
        pager.begin_pass()
        np.testing.assert_array_equal(within(lambda: logits(own, model)), expected)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_disk_error_ends_its_pass_and_no_other(checkpoint, share, monkeypatch):
    expected, preadv, fails = reference(checkpoint), os.preadv, [False]
    size = budget(checkpoint, share)

    def failing(*args):
        if fails[0]:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*args)

    with paged(checkpoint, budget_bytes=size) as (pager, model):
        monkeypatch.setattr(os, "preadv", failing)
        for _ in range(2):
            pager.begin_pass()
            fails[0] = True
            with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
                within(lambda: logits(checkpoint, model))
            fails[0] = False
        pager.begin_pass()
        np.testing.assert_array_equal(within(lambda: logits(checkpoint, model)), expected)


def test_what_was_read_ahead_and_fails_while_it_is_waited_for_is_read_again(checkpoint, monkeypatch):
    expected, read, reading, go_on = (
        reference(checkpoint),
        UncachedFile.read,
        threading.Event(),
        threading.Event(),
    )

    def failing_once(self, *args):
        if not reading.is_set():
            reading.set()
            go_on.wait(_LONG_S)
            raise CheckpointError("x cannot be read: Input/output error")
        return read(self, *args)

    monkeypatch.setattr(UncachedFile, "read", failing_once)
    with paged(checkpoint, window=2) as (_, model):
        assert reading.wait(_LONG_S)
        threading.Timer(0.05, go_on.set).start()  # by then it is waited for, or else has failed before
        np.testing.assert_array_equal(within(lambda: logits(checkpoint, model)), expected)


def test_closing_while_it_reads(checkpoint, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    read = UncachedFile.read

    def slow(self, *args):
        reading.set()
        go_on.wait(_LONG_S)
        return read(self, *args)

    monkeypatch.setattr(UncachedFile, "read", slow)
    closed, close = [], UncachedFile.close
    monkeypatch.setattr(UncachedFile, "close", lambda self: (closed.append(self), close(self)))
    pager = Pager(checkpoint.tensors, checkpoint.config, window=2)
    pager.start()
    assert reading.wait(_LONG_S)
    threading.Timer(0.05, go_on.set).start()
    within(pager.close)
    assert len(closed) == 1, "the one file that was begun"
    assert pager.usage().loaded_bytes == pager.usage().filled_bytes == 0
    with pytest.raises(RuntimeError, match="closed"), parts_of(pager)[-1].open():
        pass


# The peak of this process's memory after passes of a model of 137 MB, with what there was before.
_MEASURED = """
import json, re, sys
from pathlib import Path
from tpilite.weights.checkpoint import Checkpoint
from tpilite.collective import Solo
from tpilite.linear.linear import Linear
from tpilite.machine import peak_rss_bytes, rss_bytes
from tpilite.cli.memory_report import MemoryReport, paging_columns
from tpilite.engine.usage import Usage
from tpilite.model.llama import Llama, Segment
from tpilite.weights.pager import Pager
import numpy as np

import tpilite.weights.pager
tpilite.weights.pager.spare_bytes = lambda: 0  # no room for a page cache, so what is resident is packed
options = options_given = json.loads(sys.argv[2])
with Checkpoint(Path(sys.argv[1])) as checkpoint, Linear(2) as linear:
    linear.prepare({np.dtype(np.uint16)})
    base = rss_bytes()
    if "room" in options:
        options = {"budget_bytes": base + options["room"]}
    with Pager(checkpoint.tensors, checkpoint.config, max_rows=32, **options) as pager:
        model = Llama(checkpoint.config, pager.weights, Solo(), linear)
        cache = model.new_cache()
        for n_rows in (32, 1, 1, 1):
            pager.begin_pass(n_rows, cache.nbytes)
            model.logits(model.forward(np.ones((n_rows, 1024), np.float32), [Segment(cache, n_rows)])[-1:])
        usage, grown = pager.usage(), peak_rss_bytes() - base
        if "room" in options_given:
            pager.begin_pass(1, pager.cache_room_bytes)
        print(json.dumps([grown, usage.resident_bytes, usage.streaming_bytes, rss_bytes() - base]))
"""


@pytest.mark.parametrize(
    ("options", "most_mb"),
    [({"window": 2, "part_bytes": 4 << 20}, 40), ({"room": 110_000_000}, 110), ({"room": 250_000_000}, 200)],
)
def test_the_memory_of_the_process_stays_within_its_bound(large, options, most_mb):
    """Figures of the kernel, so with a margin: the weights alone would take 137 MB."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(large), json.dumps(options)],
        env=dict(os.environ) | {"OPENBLAS_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, resident, streaming, at_last = json.loads(done.stdout)
    assert grown <= most_mb * 1_000_000
    assert resident + streaming == 137_365_504
    assert (resident > 0) == ("room" in options)
    assert (streaming > 0) == (most_mb < 137)
    # Room for caches, which are not there, was made for the most that they may take.
    assert at_last <= 60_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    config = tiny_config(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        vocab_size=1537,
    )
    return write_checkpoint(tmp_path_factory.mktemp("models") / "large", config)

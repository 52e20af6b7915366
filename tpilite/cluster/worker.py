"""A rank above 0: it joins, fetches its slices, works, and joins again when the group is gone."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.fetch import fetch_slices
from tpilite.cluster.slice_client import Unreachable
from tpilite.cluster.splits import Split, find_split, node_folders, split_id
from tpilite.cluster.sums import new_sums
from tpilite.cluster.terms import is_served, security_of, terms_of
from tpilite.collective import Solo
from tpilite.engine.config import EngineConfig
from tpilite.engine.rank import Rank
from tpilite.errors import ConfigError, PeerLost, SliceError
from tpilite.formats.model_files import ModelFiles
from tpilite.net.address import Address
from tpilite.net.group import GroupEnded
from tpilite.net.membership import Membership, join
from tpilite.quantize.recipe import Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.slices import MANIFEST_NAME, Manifest, Progress, SliceFolder, node_folder

logger = logging.getLogger(__name__)

# How long a worker is refused the place whose slices it has before it takes any. Its own lost connection,
# which may be what has that place, is mostly noticed sooner; and to fetch other slices takes longer.
_PREFER_S = 3.0

# Without a sign of the server for this long it asks for its place again, which says who is not there.
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class WorkerOptions:
    """What the user of a worker may ask for."""

    cache: Path  # where what is known of the weights of `model` is kept, and slices where no place is given
    save_dir: Path | None = None  # None: a folder of its own for every model and partition, below `cache`
    model: ModelFiles | None = None  # which may have weights, and is then to be that of rank 0
    recipe: Recipe | None = None  # what becomes of `model`, as rank 0 makes it
    rank: int | None = None
    force_download: bool = False
    verify: bool = False
    once: bool = False
    progress: Progress | None = None


class Worker:
    """One such rank, for as long as it is wanted."""

    def __init__(
        self, address: Address, cluster: ClusterConfig, engine: EngineConfig, options: WorkerOptions
    ) -> None:
        self._address, self._cluster, self._engine, self._options = address, cluster, engine, options
        self._security = security_of(cluster)
        self._terms = _known_terms(options)
        self._force, self._verify = options.force_download, options.verify
        self._manifest: Manifest | None = None
        self._rank: Rank | None = None
        # What is kept from group to group: the slices' folder for itself, and the rank loaded from them.
        self._split: Split | None = None
        self._held, self._loaded = ExitStack(), ExitStack()

    def run(self) -> None:
        """Works until a session ends cleanly and `once` was asked for; otherwise until an error ends it."""
        wish = self._options.rank
        with self._held, self._loaded:
            while True:
                try:
                    with self._join(wish) as membership:
                        wish = membership.rank
                        self._work(membership)
                except GroupEnded as ended:
                    logger.info("%s", ended)
                    if self._options.once:
                        return
                    wish = self._options.rank
                except PeerLost as lost:
                    logger.warning("%s; joining again", lost)

    def _work(self, membership: Membership) -> None:
        folder = self._save_dir(membership.info)
        if self._split is None or self._split.folder != folder:
            self._loaded.close()
            self._rank = None
            self._held.close()
            self._split = self._held.enter_context(Split.using(folder))
        manifest = self._fetch(membership, folder)
        if self._rank is None or manifest != self._manifest:
            self._loaded.close()
            slices = self._loaded.enter_context(SliceFolder(node_folder(folder, membership.rank)))
            slices.verify(trust=True)
            first_id = slices.partition.vocab_range(membership.rank).start
            self._rank = self._loaded.enter_context(
                Rank(slices.config, slices.tensors, first_id, Solo(), self._engine)
            )
            self._manifest = manifest
        group = membership.wait_for_group(
            terms_of(manifest.fingerprint, manifest.partition), new_sum=new_sums()
        )
        with group:
            logger.info("rank %d of %d is at work", group.rank, group.world_size)
            self._rank.regroup(group)
            self._rank.runner.serve()

    def _join(self, wish: int | None) -> Membership:
        """A membership, for the rank whose slices are here already where that can be had."""
        if wish != self._options.rank:
            try:
                return self._ask(wish, patience_s=_PREFER_S)
            # Another one may have that place by now, or rank 0 was started for fewer ranks.
            except (PeerLost, ConfigError) as refused:
                logger.debug("%s", refused)
        membership = self._ask(self._options.rank)
        held = self._held_ranks(self._save_dir(membership.info))
        if self._options.rank is not None or membership.rank in held:
            return membership
        for rank in held:
            membership.close()
            try:
                return self._ask(rank, patience_s=_PREFER_S)
            except (PeerLost, ConfigError):
                membership = self._ask(None)
        return membership

    def _ask(self, rank: int | None, patience_s: float | None = None) -> Membership:
        return join(self._address, self._security, terms=self._terms, rank=rank, patience_s=patience_s)

    def _fetch(self, membership: Membership, folder: Path) -> Manifest:
        """The manifest of this rank's slices, which are on this disk now."""
        node = node_folder(folder, membership.rank)
        terms = {name: membership.info.get(name) for name in ("model", "partition")}
        is_served_here = membership.rank in membership.info.get("served", ())
        found = None if self._force else _found(node, again=is_served_here)
        fits = found is None or terms_of(found.fingerprint, found.partition) == terms
        shared = is_served(folder, membership.info.get("mark"))  # by rank 0, which is to make slices that fit
        # In the cache, a folder's name says what belongs into it: what does not is simply replaced.
        if not fits and self._options.save_dir is not None and not shared:
            raise SliceError(
                f"{node} holds slices of another model, world size or ratio than rank 0's: "
                "replace them with --force_download, or give another --save_dir"
            )
        if not is_served_here:
            if found is None or not fits:
                raise SliceError(f"rank 0 has no slices for rank {membership.rank}: bring them to {node}")
            with SliceFolder(node) as slices:
                slices.verify(self._options.progress, trust=not self._verify)
        else:
            self._fetch_served(membership, folder, shared)
            found = Manifest.read(node)
        self._force = self._verify = False
        return found

    def _fetch_served(self, membership: Membership, folder: Path, shared: bool) -> None:
        """Has the slices that rank 0 serves in `folder`; waits, with a word, where its port is blocked."""
        host, port, told = self._address[0], _file_port(membership.info), False
        while True:
            try:
                fetch_slices(
                    host,
                    port,
                    membership.rank,
                    self._cluster.token,
                    folder,
                    force=self._force,
                    verify=self._verify,
                    served=shared,
                    tls=self._security.client_tls,
                    progress=self._options.progress,
                    timeout_s=_PATIENCE_S,
                    patience_s=_PATIENCE_S,
                )
                return
            except PeerLost as lost:
                membership.check()  # knows better why, if rank 0 has ended the session
                if not isinstance(lost, Unreachable):
                    raise
                if not told:
                    logger.warning(
                        "rank 0 answers on port %d, but not on port %d, where its slices are: %s. Is a "
                        "firewall in between? Open TCP port %d on %s, or start rank 0 with another "
                        "--file_port; trying on",
                        *(self._address[1], port, lost.__cause__, port, host),
                    )
                told = True

    def _save_dir(self, info: Mapping[str, Any]) -> Path:
        if self._options.save_dir is not None:
            return find_split(self._options.save_dir, split_id(info))
        return self._options.cache / split_id(info)

    @staticmethod
    def _held_ranks(folder: Path) -> list[int]:
        """The ranks whose slices are here, the whole ones before those that were only begun."""
        ranks = [int(node.name.removeprefix("node_")) for node in node_folders(folder)]
        ranks.sort(key=lambda rank: (not (node_folder(folder, rank) / MANIFEST_NAME).exists(), rank))
        return [rank for rank in ranks if rank > 0]


def _found(node: Path, again: bool) -> Manifest | None:
    """The manifest in a folder; None where there is none, or a damaged one and it is fetched `again`."""
    try:
        return Manifest.find(node)
    except SliceError as error:
        if not again:
            raise
        logger.warning("%s: fetching it again", error)
        return None


def _known_terms(options: WorkerOptions) -> dict[str, Any]:
    """What this node knows of rank 0's terms before it joins: which model it is, where it has one itself."""
    if options.model is None or not options.model.has_weights:
        return {}
    with Checkpoint(
        options.model, options.cache, trust=not options.verify, recipe=options.recipe
    ) as checkpoint:
        return {"model": checkpoint.fingerprint}


def _file_port(info: Mapping[str, Any]) -> int:
    """Where rank 0 serves slices, by what it told. Raises `ConfigError` where that is no port."""
    port = info.get("file_port")
    if not isinstance(port, int) or not 0 < port < 65536:
        raise ConfigError(
            f"rank 0 names no port for the slices (found {port!r:.40}); use the same version everywhere"
        )
    return port

"""Rank 0 of a cluster: it slices the model, hands the slices out and waits for the other ranks.

The ports open first, so that workers may come early. When a rank is lost the port stays open and the
survivors join again for their places, so that a group forms as soon as the missing rank is back.
"""

import logging
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tpilite.closing import Closing
from tpilite.cluster.config import ClusterConfig
from tpilite.cluster.slice_server import SliceServer
from tpilite.cluster.splits import Split, folders_in
from tpilite.cluster.sums import new_sums
from tpilite.cluster.terms import mark_served, security_of, terms_of
from tpilite.engine.config import EngineConfig
from tpilite.engine.rank import Rank
from tpilite.errors import PeerLost, SliceError, TpiliteError
from tpilite.formats.model_files import ModelFiles
from tpilite.formats.stored import StoredTensor
from tpilite.net.group import RankLost, RootGroup
from tpilite.net.rendezvous import Rendezvous
from tpilite.quantize.recipe import Recipe
from tpilite.weights.checkpoint import Checkpoint
from tpilite.weights.partition import EMBEDDING
from tpilite.weights.slices import MANIFEST_NAME, Manifest, Progress, SliceFolder, node_folder

logger = logging.getLogger(__name__)

# What a user of a worker changes where it has not what rank 0 has.
_ADVICE = {
    "model": "it is another model, or has another --quantize: take away --model_path, or replace its slices "
    "with --force_download",
    "partition": "its slices are of another world size or ratio: replace them with --force_download",
}

# Ranks that come back within this time are not worth a line, and a user who waits wants one at times.
_SETTLE_S, _REMIND_S = 1.0, 60.0


class Host(Closing):
    """Rank 0 of a cluster: its own `rank`, and everything that the other ranks need to come and stay.

    `listen` opens the ports, `start` does all that takes long. `save_dir` is for slices, made from the model
    where they are missing (`force` and `replace`: see `Split.of`); where `files` has no weights, slices that
    were brought there by hand are used. With `verify` also what is known to be whole is read again. Both
    steps raise what goes wrong in them.
    """

    rank: Rank

    def __init__(
        self,
        files: ModelFiles,
        save_dir: Path,
        cluster: ClusterConfig,
        engine: EngineConfig,
        *,
        force: bool = False,
        replace: bool = False,
        verify: bool = False,
        recipe: Recipe | None = None,
    ) -> None:
        self._files, self._save_dir, self._cluster, self._engine = files, save_dir, cluster, engine
        self._force, self._replace, self._verify, self._recipe = force, replace, verify, recipe
        self._stack = ExitStack()
        self._given_up: TpiliteError | None = None
        self.formed_s = 0.0  # when the last group formed, by the monotonic clock

    def listen(self) -> None:
        """Finds out what to slice and where to, and opens the ports."""
        with ExitStack() as stack:
            cluster = self._cluster
            security = security_of(cluster)
            self._source = source = stack.enter_context(
                _Source(
                    self._files,
                    self._save_dir,
                    cluster,
                    self._force,
                    self._replace,
                    self._verify,
                    self._recipe,
                )
            )
            self.config, self.partition = source.config, source.partition
            terms = terms_of(source.fingerprint, source.partition)
            self._others = [r for r in range(1, cluster.world_size) if source.makes or source.has(r)]
            self._server = stack.enter_context(
                SliceServer(
                    self._others,
                    cluster.token,
                    cluster.file_port,
                    tls=security.server_tls,
                    host=cluster.host,
                )
            )
            self._rendezvous = stack.enter_context(
                Rendezvous(
                    (cluster.host, cluster.broadcast_port),
                    security,
                    world_size=cluster.world_size,
                    terms=terms,
                    info={
                        "file_port": self._server.port,
                        "served": self._others,
                        "mark": mark_served(source.split.folder),
                        **terms,
                    },
                    advice=_ADVICE,
                    timeout_s=cluster.timeout_s,
                    allreduce=cluster.allreduce,
                    payload=cluster.payload,
                    protect=cluster.protect,
                    new_sum=new_sums(),
                )
            )
            self._stack = stack.pop_all()

    def start(self, progress: Progress | None = None) -> None:
        """Slices the model, hands the slices out, waits for the other ranks, and loads this one."""
        source = self._source
        self._serve(progress)
        slices = self._stack.enter_context(SliceFolder(source.split.node(0)))
        slices.verify(trust=source.makes or not self._verify)
        group = self._whole_group(None)
        self.rank = self._stack.enter_context(
            Rank(self.config, source.with_embedding(slices.tensors), 0, group, self._engine)
        )

    def _serve(self, progress: Progress | None) -> None:
        """Makes the slices that are missing, and hands out all."""
        self._source.slice(progress)
        for rank in self._others:
            self._server.publish(rank, self._source.split.node(rank))

    @property
    def split_folder(self) -> Path:
        """Where this session's slices are, in `save_dir` or beside others there."""
        return self._source.split.folder

    @property
    def broadcast_port(self) -> int:
        """Where workers join."""
        return self._rendezvous.port

    @property
    def states(self) -> Mapping[int, str]:
        """Of every rank above 0: "missing", "preparing" or "ready"."""
        return self._rendezvous.states

    def recover(self, lost: PeerLost) -> None:
        """Waits until the group is whole again, to go on in it. Raises `PeerLost` if that takes too long."""
        who = f"rank {lost.rank}" if isinstance(lost, RankLost) else "everyone"
        logger.warning("the text goes on when %s is back; what has ended there must be started again", who)
        self.rank.regroup(self._whole_group(self._cluster.rejoin_timeout_s))

    def give_up(self, error: TpiliteError) -> None:
        """Has this error raised by who waits for a group now or later. For any thread."""
        self._given_up = error

    def _whole_group(self, timeout_s: float | None) -> RootGroup:
        """The group of all ranks; says who is waited for."""
        started_s = time.monotonic()
        told, told_s = "", started_s
        while True:
            if self._given_up is not None:
                raise self._given_up
            if self._server.lost:
                logger.warning("slices in %s are gone: they are made again", self.split_folder)
                self._serve(None)
            left_s = _SETTLE_S if timeout_s is None else started_s + timeout_s - time.monotonic()
            try:
                group = self._rendezvous.wait_for_group(min(_SETTLE_S, left_s))
                self.formed_s = time.monotonic()
                return group
            except PeerLost:
                now_s, waiting = time.monotonic(), _describe(self._rendezvous.states)
                if timeout_s is not None and left_s <= _SETTLE_S:
                    raise PeerLost(
                        f"gave up after {timeout_s:g} s: {waiting}; --rejoin_timeout sets how long to wait"
                    ) from None
                if waiting != told or now_s - told_s > _REMIND_S:
                    logger.info("waiting: %s", waiting)
                    told, told_s = waiting, now_s

    def close(self) -> None:
        """Ends the session of every rank, closes the ports and frees what is held."""
        self._stack.close()


def own_address() -> str:
    """The address of this machine in its network, for others to join; its name where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            # Connecting a datagram socket sends nothing: it looks up the route, to an example address.
            sock.connect(("192.0.2.1", 9))
            return str(sock.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _describe(states: Mapping[int, str]) -> str:
    """ "rank 1 is preparing; ranks 2, 4 are missing" """
    parts = []
    for state in ("preparing", "missing"):
        ranks = [str(rank) for rank, found in states.items() if found == state]
        if ranks:
            parts.append(
                f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} {'are' if ranks[1:] else 'is'} {state}"
            )
    return "; ".join(parts)


class _Source(Closing):
    """Where rank 0 has the model from: a checkpoint to slice, or slices that were brought."""

    def __init__(
        self,
        files: ModelFiles,
        save_dir: Path,
        cluster: ClusterConfig,
        force: bool,
        replace: bool,
        verify: bool,
        recipe: Recipe | None,
    ) -> None:
        self._verify = verify
        self._checkpoint: Checkpoint | None = None
        carried = None if files.has_weights else _carried(save_dir, cluster.world_size)
        if carried is not None:
            self.split = Split.using(carried)
            manifest = Manifest.read(self.split.node(0))
            self.config, self.partition = manifest.config, manifest.partition
            self.fingerprint = manifest.fingerprint
            return
        self._checkpoint = Checkpoint(files, save_dir, trust=not verify, recipe=recipe)
        try:
            self.config = self._checkpoint.config
            self.partition = self._checkpoint.partition(cluster.world_size, cluster.ratio)
            self.fingerprint = self._checkpoint.fingerprint
            self.split = Split.of(self._checkpoint, self.partition, save_dir, force=force, replace=replace)
        except BaseException:
            self._checkpoint.close()
            raise

    def close(self) -> None:
        """Closes the checkpoint, and lets others remove the slices."""
        self.split.close()
        if self._checkpoint is not None:
            self._checkpoint.close()

    @property
    def makes(self) -> bool:
        """Whether slices can be made here, for every rank."""
        return self._checkpoint is not None

    def has(self, rank: int) -> bool:
        """Whether the slices of a rank are here."""
        return (self.split.node(rank) / MANIFEST_NAME).exists()

    def slice(self, progress: Progress | None) -> None:
        """Makes the slices that are missing, if there is a checkpoint to make them from."""
        if self._checkpoint is not None:
            self.split.make(
                self._checkpoint,
                self.partition,
                embedding=self._checkpoint.recipe is not None,  # else it is read where the model is
                verify=self._verify,
                progress=progress,
            )
            self._verify = False

    def with_embedding(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """Rank 0's tensors: the embedding from the checkpoint, where the slice was made without one."""
        if EMBEDDING in tensors or self._checkpoint is None:
            return tensors
        return {**tensors, EMBEDDING: self._checkpoint.tensors[EMBEDDING]}


def _carried(save_dir: Path, world_size: int) -> Path | None:
    """The folder that rank 0's slice was brought to, for that many ranks; None where there is no slice.

    Raises `SliceError` where there are only slices for other numbers of ranks.
    """
    found = [folder for folder in folders_in(save_dir) if (node_folder(folder, 0) / MANIFEST_NAME).exists()]
    sizes = [Manifest.read(node_folder(folder, 0)).partition.world_size for folder in found]
    for folder, size in zip(found, sizes, strict=True):
        if size == world_size:
            return folder
    if sizes:
        raise SliceError(
            f"the slices in {save_dir} are for {sizes[0]} ranks and this start "
            f"is for {world_size}: start with --world_size {sizes[0]}"
        )
    return None

"""A cluster as its users run it: processes on loopback that are stopped, killed, misused and started again.

The text of a tiny random model, sampled from one seed, tells whether anything got lost: a single wrong
number would soon choose another token.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import certificates
from checkpoints import tiny_config, write_checkpoint
from frame_relay import FrameRelay
from nodes import TOKEN, TOKENIZER, Cluster, Node, Nodes, Story, free_ports, make_story

from tpilite import LLM, SamplingParams
from tpilite.weights.slices import SliceFolder, node_folder


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("story"))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path) as nodes:
        yield nodes


def written(folder: Path) -> dict[str, int]:
    """When each file of a folder was written, to see that none is written again."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


# The same text


@pytest.mark.parametrize(
    "ranks", [["2", "--ratio", "1,9"], ["3"], ["5", "--ratio", "2,1,1,4,1"], ["8"]], ids=" ".join
)
def test_any_number_of_ranks_makes_the_text_of_one(
    nodes: Nodes, story: Story, tmp_path: Path, ranks: list[str]
) -> None:
    options = ("--model_path", story.folder, "--save_dir", tmp_path / "split", "--allreduce", "star")
    node = nodes.start(*options, "--local", *ranks, *story.ask)
    assert node.finish() == 0, node.err
    assert node.out == story.text


def test_any_number_of_ranks_tells_a_trained_model_s_story(nodes: Nodes, shared_models: Path) -> None:
    folder = shared_models / "stories260K"
    ask = ("--prompt", "", "--temperature", "0", "--length", "199")
    node = nodes.start("--model_path", folder, "--local", 3, "--ratio", "2,1,1", *ask)
    assert node.finish() == 0, node.err
    assert node.out == (folder / "expected.txt").read_text()


# Starting one


def test_the_original_s_way_and_prompt_after_prompt(nodes: Nodes, story: Story) -> None:
    broadcast_port, file_port = free_ports(2)
    ports = ("--broadcast_port", broadcast_port, "--file_port", file_port)
    environment = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "TPILITE_TOKEN": TOKEN}
    worker = nodes.start(*ports, "--once", home="worker", RANK="1", **environment)
    worker.wait_for_line(f"waiting for rank 0: 127.0.0.1:{broadcast_port} cannot be reached")
    ask = story.ask[2:]
    host = nodes.start("--model_path", story.folder, *ports, *ask, "--lines", RANK="0", **environment)
    for n in (1, 2):
        host.type("It was\n")
        host.wait_for_line("tokens/s", times=n)
    host.end_input()
    assert host.finish() == 0
    assert host.out == 2 * story.text
    assert worker.finish() == 0
    assert worker.err.count("is at work") == 1
    assert host.err.count("is complete") == 1


def test_slices_carried_by_hand(nodes: Nodes, story: Story, tmp_path: Path) -> None:
    split = tmp_path / "split"
    cut = ("--model_path", story.folder, "--world_size", 3, "--ratio", "2,1,1", "--save_dir", split)
    node = nodes.start(*cut, "--split_only")
    assert node.finish() == 0
    assert node.out.split() == [str(node_folder(split, rank)) for rank in range(3)]
    bare = Story(tmp_path / "bare", story.ask, story.text)
    bare.folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(story.folder / name, bare.folder)
    (tmp_path / "host" / "split").mkdir(parents=True)
    node_folder(split, 0).rename(node_folder(tmp_path / "host" / "split", 0))
    cluster = Cluster(nodes, bare, 3)
    # Each finds its rank by what it was given, not by the order in which they come.
    for rank in (2, 1):
        carried = tmp_path / f"machine{rank}"
        carried.mkdir()
        node_folder(split, rank).rename(node_folder(carried, rank))
        cluster.start_worker(f"worker{rank}", "--save_dir", carried)
        cluster.host.wait_for_line(f"joined as rank {rank}")
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text


def test_what_is_asked_for_wrongly_is_said(nodes: Nodes, story: Story) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        model = ("--model_path", story.folder, "--save_dir", nodes.folder / "split", *story.ask)
        wrong = [
            (("--world_size", 2, "--broadcast_port", port, "--file_port", 0), "--broadcast_port chooses"),
            (("--world_size", 2, "--broadcast_port", 0, "--file_port", port), "--file_port chooses"),
            (("--local", 2, "--world_size", 3), "give only one"),
            (("--world_size", 2, "--ratio", "1,2,3"), "a share for each of the 2 ranks"),
            (("--world_size", 2, "--ratio", "1,x"), "a number for each rank"),
            (("--world_size", 0), "world_size must be"),
            (("--rank", -1, "--world_size", 2), "a rank must be"),
            (("--rank", 1, "--world_size", 2), "--master_addr"),
        ]
        started = [(nodes.start(*model, *options, token=TOKEN), text) for options, text in wrong]
        for node, text in started:
            assert node.finish() == 2
            assert text in node.lines[-2]


def test_a_wrong_token_and_one_that_is_missing(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2)
    join = ("--join", f"127.0.0.1:{cluster.broadcast_port}")
    cluster.host.wait_for_line("tpilite-node --join")
    assert TOKEN not in cluster.host.err
    wrong, missing = nodes.start(*join, token="another-of-these"), nodes.start(*join)
    wrong.wait_for_line("did not accept the token")  # and waits for one that does
    assert "another-of-these" not in wrong.err
    assert missing.finish() == 2
    assert "--token" in missing.err
    cluster.host.wait_for_line("does not know the token")
    cluster.start_worker("worker")
    assert cluster.host.finish() == 0
    assert cluster.host.out == story.text


def test_a_token_from_a_file_of_the_users_own(nodes: Nodes, story: Story) -> None:
    path = nodes.folder / "secret"
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    model = ("--model_path", story.folder, "--save_dir", nodes.folder / "split", *story.ask)
    ports = ("--broadcast_port", 0, "--file_port", 0, "--world_size", 2, "--host", "127.0.0.1")
    open_to_all = nodes.start(*model, *ports, "--token_file", path)
    missing = nodes.start(*model, *ports, "--token_file", nodes.folder / "none")
    assert open_to_all.finish() == missing.finish() == 2
    assert "chmod 600" in open_to_all.err
    assert "none does not exist" in missing.err
    path.chmod(0o600)
    host = nodes.start(*model, *ports, "--token_file", path)
    address = host.wait_for_line("tpilite-node --join 127.0.0.1:").split()[-1]
    assert TOKEN not in host.err
    nodes.start("--join", address, "--token_file", path)
    assert host.finish() == 0
    assert host.out == story.text


def test_a_token_that_was_made_is_shown_in_the_environment_of_the_line_to_run(
    nodes: Nodes, story: Story
) -> None:
    ports = ("--broadcast_port", 0, "--file_port", 0, "--world_size", 2)
    host = nodes.start("--model_path", story.folder, "--save_dir", nodes.folder / "split", *story.ask, *ports)
    line = host.wait_for_line("tpilite-node --join")
    (token_file,) = (nodes.folder / "home0").glob("**/token")
    assert line.strip().startswith(f"TPILITE_TOKEN={token_file.read_text().strip()} tpilite-node --join ")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc to see what listens")
def test_ranks_of_one_machine_listen_there_alone(nodes: Nodes, story: Story) -> None:
    node = nodes.start(
        "--model_path", story.folder, "--save_dir", nodes.folder / "split", "--local", 2, "--serve",
        "--api_port", 0,
    )  # fmt: skip
    node.wait_for_line("the page and the API are at")
    pids = [node.pid, int(next(x for x in node.lines if "rank 1 is process" in x).split()[-1])]
    inodes = {
        os.readlink(fd).strip("socket:[]")
        for pid in pids
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(fd).startswith("socket:")
    }
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    listening = [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes]
    assert len(listening) >= 3  # to join, slices, and the API
    assert set(listening) == {"0100007F"}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc to see what ps shows")
def test_the_token_is_kept_from_others_of_the_machine(nodes: Nodes, story: Story) -> None:
    options = ("--model_path", story.folder, "--save_dir", nodes.folder / "split")
    node = nodes.start(*options, "--local", 2, *story.ask)
    pids = [node.pid, int(node.wait_for_line("rank 1 is process").split()[-1])]
    (token_file,) = (nodes.folder / "home0").glob("**/token")
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_text().strip()
    assert len(token) >= 16
    for pid in pids:
        shown = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"tpilite-node" in shown
        assert token.encode() not in shown
    assert token not in node.err


@pytest.mark.parametrize(
    ("kind", "harm"), [("reduce", "flip"), ("reduce", "repeat"), ("broadcast", "flip"), ("gather", "flip")]
)
def test_harm_done_on_the_way_does_not_change_the_text(
    kind: str, harm: str, nodes: Nodes, story: Story
) -> None:
    cluster = Cluster(nodes, story, 2, "--protect")
    cluster.host.wait_for_line("tpilite-node --join")
    with FrameRelay(cluster.broadcast_port, kind, harm, nth=20) as relay:
        worker = cluster.start_worker("worker", port=relay.port)
        assert cluster.host.finish() == 0
        assert relay.harmed.is_set()
        assert cluster.host.out == story.text
        worker.kill()
    assert "the connection cannot be trusted" in cluster.host.err + worker.err


# What is lost


def test_a_killed_worker_comes_back(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3)
    workers = [cluster.start_worker(f"worker{i}") for i in range(2)]
    where = random.randrange(1, len(story.text) // 3)
    cluster.host.wait_for_text(where)
    rank = int(re.search(r"rank (\d) of 3 is at work", workers[0].err)[1])
    before = written(cluster.slices("worker0", rank))
    workers[0].kill()
    cluster.host.wait_for_line(f"the text goes on when rank {rank} is back")
    back = cluster.start_worker("worker0")
    assert cluster.host.finish() == 0, (where, cluster.host.err)
    assert cluster.host.out == story.text, where
    back.wait_for_line(f"rank {rank} of 3 is at work")
    assert written(cluster.slices("worker0", rank)) == before


def test_a_killed_local_rank_is_started_again(nodes: Nodes, story: Story) -> None:
    options = ("--model_path", story.folder, "--save_dir", nodes.folder / "split", "--allreduce", "star")
    node = nodes.start(*options, "--local", 3, *story.ask)
    line = node.wait_for_line("rank 1 is process")
    node.wait_for_text(random.randrange(1, len(story.text) // 3))
    os.kill(int(line.split()[-1]), signal.SIGKILL)
    node.wait_for_line("rank 2 ended (exit code -9) and is started again")
    assert node.finish() == 0, node.err
    assert node.out == story.text


def test_a_frozen_worker_is_noticed_and_goes_on(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3, "--timeout", 1)
    workers = [cluster.start_worker(f"worker{i}") for i in range(2)]
    cluster.host.wait_for_text(10)
    workers[1].signal(signal.SIGSTOP)
    cluster.host.wait_for_line("was silent for 1 s")
    workers[0].wait_for_line("was silent for 1 s; joining again")
    workers[1].signal(signal.SIGCONT)
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text


def test_workers_return_to_a_rank_0_that_is_killed_or_frozen(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3, "--timeout", 1)
    workers = [cluster.start_worker(f"worker{i}") for i in range(2)]
    cluster.host.wait_for_text(10)
    cluster.host.kill()
    again = cluster.start_host()
    again.wait_for_text(10)
    again.signal(signal.SIGSTOP)
    for worker in workers:
        worker.wait_for_line("was silent for 1 s; joining again")
    again.signal(signal.SIGCONT)
    assert again.finish() == 0, again.err
    assert again.out == story.text
    for worker in workers:
        worker.wait_for_line("rank 0 ended the session")
        assert worker.process.poll() is None


def test_workers_take_what_rank_there_is_when_rank_0_comes_back_smaller(
    nodes: Nodes, story: Story, tmp_path: Path
) -> None:
    cluster = Cluster(nodes, story, 3)
    workers = [cluster.start_worker(f"worker{i}") for i in range(2)]
    cluster.host.wait_for_text(10)
    cluster.host.kill()
    cluster.options = ("--model_path", story.folder, "--world_size", 2)
    cluster.host_split = tmp_path / "split2"
    cluster.start_host()
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
    assert [worker.process.poll() for worker in workers] == [None, None]


def test_a_worker_whose_place_was_taken_meanwhile_takes_another(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3)
    workers = [cluster.start_worker(f"worker{i}") for i in range(2)]
    cluster.host.wait_for_text(10)
    ranks = {int(worker.wait_for_line("is at work").split()[2]): worker for worker in workers}
    ranks[1].signal(signal.SIGSTOP)
    ranks[2].kill()
    cluster.host.kill()
    cluster.start_host()
    cluster.start_worker("another", "--rank", 1)
    cluster.host.wait_for_line("joined as rank 1")
    ranks[1].signal(signal.SIGCONT)
    cluster.host.wait_for_line("joined as rank 2")
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text


def test_a_wait_that_is_too_long_ends_with_the_text_so_far(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2, "--rejoin_timeout", 1)
    worker = cluster.start_worker("worker")
    cluster.host.wait_for_text(10)
    worker.kill()
    assert cluster.host.finish() == 3
    assert cluster.host.out.endswith("\n")
    assert story.text.startswith(cluster.host.out[:-1])
    assert "gave up after 1 s: rank 1 is missing" in cluster.host.lines[-2]


def test_a_rank_lost_between_prompts_is_told_at_once(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2, start=False)
    host = cluster.start_host(*story.ask[2:], "--lines")
    worker = cluster.start_worker("worker")
    host.type("It was\n")
    host.wait_for_line("tokens/s")
    worker.kill()
    host.wait_for_line("closed the connection")
    cluster.start_worker("worker")
    host.wait_for_line("joined as rank 1", times=2)
    host.type("It was\n")
    host.end_input()
    assert host.finish() == 0, host.err
    assert host.out == 2 * story.text


def test_ctrl_c_ends_the_wait_for_a_lost_rank(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2)
    worker = cluster.start_worker("worker")
    cluster.host.wait_for_text(10)
    worker.kill()
    cluster.host.wait_for_line("the text goes on when rank 1 is back")
    cluster.host.signal(signal.SIGINT)
    assert cluster.host.finish() == 130
    assert story.text.startswith(cluster.host.out[:-1])
    assert "Traceback" not in cluster.host.err


def test_a_worker_that_comes_back_with_another_model_is_refused(
    nodes: Nodes, story: Story, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=5)
    cluster = Cluster(nodes, story, 2)
    worker = cluster.start_worker("worker")
    cluster.host.wait_for_text(10)
    worker.kill()
    wrong = cluster.start_worker("worker", "--model_path", other)
    assert wrong.finish() == 2
    for node in (wrong, cluster.host):
        node.wait_for_line("another model")
    assert (other / "split" / ".content.json").exists(), "what is known of the model stands beside its slices"
    # Slices of another ratio, brought under the right rank, are refused likewise.
    stale = tmp_path / "stale"
    cut = ("--model_path", story.folder, "--world_size", 2, "--ratio", "3,1", "--save_dir", stale)
    assert nodes.start(*cut, "--split_only").finish() == 0
    wrong = cluster.start_worker("worker", "--save_dir", stale)
    assert wrong.finish() == 2
    for node in (wrong, cluster.host):
        node.wait_for_line("--force_download")
    cluster.start_worker("worker", "--save_dir", stale, "--force_download")
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text


# Asked to end


def test_ctrl_c_on_rank_0_sends_workers_back_to_waiting(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3)
    stays, ends = cluster.start_worker("stays"), cluster.start_worker("ends", "--once")
    cluster.host.wait_for_text(10)
    cluster.host.signal(signal.SIGINT)
    assert cluster.host.finish() == 130
    assert ends.finish() == 0
    stays.wait_for_line("waiting for rank 0")
    cluster.start_host()
    cluster.start_worker("ends")
    assert cluster.host.finish() == 0
    assert cluster.host.out == story.text
    stays.wait_for_line("rank 0 ended the session", times=2)
    stays.signal(signal.SIGINT)
    assert stays.finish() == 130


def test_nodes_that_are_asked_to_end_say_goodbye(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 3)
    workers = [cluster.start_worker(f"worker{i}") for i in range(2)]
    cluster.host.wait_for_text(10)
    workers[0].signal(signal.SIGINT)
    assert workers[0].finish() == 130
    cluster.host.wait_for_line("left the group")
    workers[1].signal(signal.SIGTERM)
    assert workers[1].finish() == 143
    cluster.host.signal(signal.SIGTERM)
    assert cluster.host.finish() == 143
    for node in (cluster.host, *workers):
        assert "Traceback" not in node.err


# Connections without a proof


def test_noise_at_both_ports_does_not_disturb(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2)
    cluster.start_worker("worker")
    cluster.host.wait_for_text(1)
    noise = random.Random(3).randbytes(5000)
    says = [b"", b"GET / HTTP/1.1\r\n\r\n", noise, b"\x16\x03\x01\x02\x00", b"TPI", bytes(64), b"\n" * 9]
    held = []
    for port in (cluster.broadcast_port, cluster.file_port):
        for said in says * 5:
            sock = socket.create_connection(("127.0.0.1", port))
            held.append(sock)
            with contextlib.suppress(OSError):  # it was closed already
                sock.sendall(said)
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
    assert "Traceback" not in cluster.host.err
    assert 1 <= cluster.host.err.count("unauthenticated") <= 20
    for sock in held:
        sock.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for certificates")
def test_tls(nodes: Nodes, story: Story, tmp_path: Path) -> None:
    certificates(tmp_path, "a", "b", "c")

    def tls(name: str) -> list[object]:
        own = ["--tls_cert", tmp_path / f"{name}.pem", "--tls_key", tmp_path / f"{name}.key"]
        return [*own, "--tls_ca", tmp_path / "ca.pem"]

    cluster = Cluster(nodes, story, 3, *tls("a"))
    plain = cluster.start_worker("worker1")
    plain.wait_for_line("if it uses TLS")
    plain.kill()
    uncertified = cluster.start_worker("worker1", "--tls_ca", tmp_path / "ca.pem")
    uncertified.wait_for_line("does not let this node in")
    uncertified.kill()
    worker = cluster.start_worker("worker1", *tls("b"))
    cluster.start_worker("worker2", *tls("c"))
    cluster.host.wait_for_text(10)
    worker.kill()
    cluster.start_worker("worker1", *tls("b"))
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text


# Slices


def test_a_sync_that_is_killed_on_both_sides_goes_on(nodes: Nodes, tmp_path: Path) -> None:
    config = tiny_config(
        hidden_size=512, intermediate_size=3000, head_dim=64, num_hidden_layers=6, vocab_size=656
    )
    folder = write_checkpoint(tmp_path / "larger", config)
    shutil.copy(TOKENIZER, folder)
    ask = ("--prompt", "It was", "--temperature", "0", "--length", "4")
    with LLM(folder) as llm:
        text = llm.generate("It was", SamplingParams(temperature=0, length=4)).text + "\n"
    cluster = Cluster(nodes, Story(folder, ask, text), 3)
    split = tmp_path / "host" / "split"
    wait_for_file(split, "node_1/layers.1.*", cluster.host)
    cluster.host.kill()  # while it slices
    assert not list(split.glob("*/manifest.json"))
    cluster.start_host()
    workers = {home: cluster.start_worker(home) for home in ("worker1", "worker2")}
    for i, home in enumerate(("worker1", "worker2", "worker1")):
        wait_for_file(tmp_path / home, f"**/layers.{2 * i}.mlp.*", workers[home])
        workers[home].kill()
        if i == 1:
            cluster.host.kill()
            cluster.start_host()
        workers[home] = cluster.start_worker(home)
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == text
    for home in workers:
        (manifest,) = (tmp_path / home).glob("**/manifest.json")
        assert not list((tmp_path / home).glob("**/*.safetensors.part"))
        with SliceFolder(manifest.parent) as slices:
            slices.verify()


def test_a_worker_in_the_folder_of_rank_0_takes_nothing_away(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2)
    there = ("--save_dir", cluster.host_split, "--force_download", "--once")
    worker = cluster.start_worker("worker", *there)
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
    assert worker.finish() == 0
    damaged = cluster.host_split / "node_1" / "layers.0.attn.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    cluster.start_host()
    cluster.host.wait_for_line("making the slices of rank 1 again")
    worker = cluster.start_worker("worker", *there)
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
    assert damaged.read_bytes() != content


def test_slices_that_are_removed_while_rank_0_runs_are_made_again(nodes: Nodes, story: Story) -> None:
    cluster = Cluster(nodes, story, 2)
    worker = cluster.start_worker("worker1")
    cluster.host.wait_for_text(10)
    worker.kill()
    shutil.rmtree(cluster.host_split)
    cluster.start_worker("worker2")
    assert cluster.host.finish() == 0, cluster.host.err
    assert cluster.host.out == story.text
    assert "are gone: they are made again" in cluster.host.err


def test_any_number_of_ranks_in_the_same_folder_also_at_once(
    nodes: Nodes, story: Story, tmp_path: Path
) -> None:
    folder = shutil.copytree(story.folder, tmp_path / "model")
    options = ("--model_path", folder, "--allreduce", "star", *story.ask)
    first = nodes.start(*options, "--local", 2)
    first.wait_for_line("rank 1 is process")
    others = [nodes.start(*options, "--local", n) for n in (2, 3)]
    for node in (first, *others):
        assert node.finish() == 0, node.err
        assert node.out == story.text
    made = {path.relative_to(folder): written(path) for path in (folder / "split").glob("**/node_*")}
    assert len(made) == 2 + 3
    for n in (3, 2):
        node = nodes.start(*options, "--local", n)
        assert node.finish() == 0, node.err
        assert node.out == story.text
    assert {path.relative_to(folder): written(path) for path in (folder / "split").glob("**/node_*")} == made


def wait_for_file(folder: Path, pattern: str, maker: Node) -> None:
    deadline_s = time.monotonic() + 30
    while not any(folder.glob(pattern)):
        assert maker.process.poll() is None, maker.err
        assert time.monotonic() < deadline_s, f"no {pattern} in {folder}: {maker.err}"
        time.sleep(0.002)

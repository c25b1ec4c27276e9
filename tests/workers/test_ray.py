"""Two nodes on this machine: the same results, also when one is killed; an open cluster refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penjing.errors import InputError, UsageError
from penjing.workers import Where, crew, in_order

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import pieces

from clusters import cluster, have_ray


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from penjing.workers import ray as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with (
        pytest.raises(UsageError, match=r"pip install 'penjing\[ray\]'"),
        crew(Where(ray="auto"), tmp_path),
    ):
        pass


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "--help", "host:1 --x"])
def test_what_is_no_address_is_refused(address: str, tmp_path: Path) -> None:
    have_ray()
    with (
        pytest.raises(UsageError, match="HOST:PORT of its head, or auto"),
        crew(Where(ray=address), tmp_path),
    ):
        pass


def test_two_nodes_of_which_one_is_killed(tmp_path: Path) -> None:
    have_ray()
    shipped = tmp_path / "shipped"
    (shipped / "in").mkdir(parents=True)
    (shipped / "in" / "factor.txt").write_text("3")
    with cluster(2) as two:
        where = Where(ray=two.address)
        with crew(where, tmp_path) as hands:
            assert hands.room == 2
            hands.start(pieces.Begin(tmp_path, hands.ship(shipped)))
            kinds = ["slow-first", "slow-first", "deadly-once", "plain", "plain"]
            assert list(in_order(hands, enumerate(kinds))) == [3 * i * i for i in range(5)]
            with pytest.raises(InputError, match="seven; got there"):
                list(in_order(hands, [(0, "wrong")]))
            lines = len((tmp_path / "done").read_text().split())
            numbers = range(10, 26)
            for number in numbers:
                hands.give(number, (number, "brief"))
            while len((tmp_path / "done").read_text().split()) < lines + 4:
                time.sleep(0.01)
            two.remove_node(sorted(two.worker_nodes, key=id)[0], allow_graceful=False)
            taken = [hands.take() for _ in numbers]
            assert sorted(taken) == [(i, 3 * i * i) for i in numbers]
        with (
            pytest.raises(InputError, match="no node of the cluster has so many cores; got 2"),
            crew(Where(ray=two.address, threads=2), tmp_path),
        ):
            pass


def test_a_cluster_without_a_token_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    have_ray()
    # A process of its own: this one has a token already.
    script = Path(__file__).with_name("open_cluster.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, allowed = done.stdout.splitlines()
    assert "asks for no token: whoever reaches it runs code on it" in refused
    assert "RAY_AUTH_MODE=token" in refused
    assert allowed == "[0, 1, 4]"


def test_an_address_where_nothing_listens_is_said(tmp_path: Path) -> None:
    have_ray()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        pytest.raises(InputError, match=f"no Ray cluster answers at {address}"),
        crew(Where(ray=address), tmp_path),
    ):
        pass

"""Small Ray clusters on this machine, each in processes of its own, for tests and the bench."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["cluster", "have_ray"]

NODE = {"object_store_memory": 100_000_000, "include_dashboard": False}


def have_ray() -> None:
    """Skip the test without Ray. Before Ray is imported: a process reads its token once."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("package ray is not installed")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(20))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@contextmanager
def cluster(nodes: int) -> Iterator[Any]:
    """A head without cores and so many nodes of one core, with this process's token."""
    have_ray()
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": folder, **NODE})
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1, wait=False, **NODE)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

"""A process of `penjing.workers.processes`: python -m penjing.workers._process DESCRIPTOR."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from penjing.errors import PenjingError
from penjing.workers._ready import Reply, do, meet, ready, unsendable

__all__: list[str] = []


def _listen(pipe: Connection, pieces: queue.SimpleQueue[bytes]) -> None:
    """Take what comes, also amid a piece: the driver's end closes when it is gone, and then
    nobody wants the piece."""
    while True:
        try:
            pieces.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def main() -> None:
    """Get ready, and do pieces until the driver ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends this one
    pipe = Connection(int(sys.argv[1]))
    said, folder = pipe.recv()
    begin = pipe.recv_bytes()
    pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, pieces), daemon=True).start()
    failed = work = None
    try:
        meet(said)
        try:
            made = pickle.loads(begin)
        except Exception as error:  # of the user's own modules, which are imported here
            raise unsendable(error) from error
        work = ready(made, Path(folder))
    except PenjingError as error:
        failed = Reply(error=error)
    except Exception:
        failed = Reply(defect=traceback.format_exc())
    while True:
        piece = pickle.loads(pieces.get())
        pipe.send(failed if work is None else do(work, piece))


if __name__ == "__main__":
    main()

"""Writes to both stores in a folder, as the service does, until its standard input ends.

Says a line after every round. Window ``seq`` of ``dev-1`` is in the store before the ledger's cursor says ``seq``.
"""

import sys
import threading
from contextlib import closing
from pathlib import Path

from aggregator.adapters.ledger import Ledger
from aggregator.adapters.windows import Windows
from aggregator.records import AuditEntry
from edge_runtime.contract.ids import DeviceId
from tests.support.fleet import DAY, NOW, A, window
from tests.support.window_kit import put


def wait_for_the_end(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    stop = threading.Event()
    threading.Thread(target=wait_for_the_end, args=(stop,), daemon=True).start()
    seq = 0
    with (
        closing(Ledger(folder / "ledger.sqlite")) as ledger,
        closing(Windows(folder / "windows.sqlite")) as store,
    ):
        while not stop.is_set():
            seq += 1
            put(
                store, window(seq=seq, labelled=3, correct=2), window("dev-2", seq), at=NOW + seq * DAY // 100
            )
            if seq % 50 == 0:
                store.prune(NOW + (seq - 40) * DAY // 100)
            with ledger.transaction():
                ledger.put_audit(AuditEntry(at_ns=NOW + seq, who="writer", what=str(seq), why=""))
                ledger.put_cursor(A, DeviceId("dev-1"), 2 * seq)
            print(seq, flush=True)

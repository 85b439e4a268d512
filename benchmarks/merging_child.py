"""whylogs on windows of the same rows, in its own environment: needs nothing of skiff.

    python merging_child.py ROWS.npy WINDOWS

A line of JSON on stdout: bytes of a serialized profile, and microseconds of a merge without and with its reading.
"""

import importlib
import json
import sys
import time
import warnings

import numpy as np
import pandas as pd


def main() -> int:
    warnings.simplefilter("ignore")
    why = importlib.import_module("whylogs")
    view_of = importlib.import_module("whylogs.core.view.dataset_profile_view").DatasetProfileView
    rows, windows = np.load(sys.argv[1]), int(sys.argv[2])
    names = [f"f{j}" for j in range(rows.shape[1])]
    views = [why.log(pd.DataFrame(part, columns=names)).view() for part in np.split(rows, windows)]
    messages = [view.serialize() for view in views]
    began = time.perf_counter()
    total = views[0]
    for view in views[1:]:
        total = total.merge(view)
    between = time.perf_counter()
    again = view_of.deserialize(messages[0])
    for message in messages[1:]:
        again = again.merge(view_of.deserialize(message))
    ended = time.perf_counter()
    found = {
        "bytes": sum(map(len, messages)) / windows,
        "merge_us": (between - began) / (windows - 1) * 1e6,
        "both_us": (ended - between) / (windows - 1) * 1e6,
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

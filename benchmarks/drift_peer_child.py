"""One peer on many fleets, in the peer's own environment: needs nothing of skiff.

    python drift_peer_child.py PEER FOLDER [NAME ...]

Each folder in FOLDER, or those named, has ``reference.parquet`` and ``data.parquet`` with a column ``window`` and the
features. A line of JSON on stdout per fleet: its name, and per window the names of the columns that the peer says have
drifted, by its own defaults. For ``cbpe`` the columns are ``score``, ``prediction`` and ``label``, and what it says of
each window is ``[estimated accuracy, whether it alerts]``.
"""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

Named = list[list[str]]


def evidently(reference: pd.DataFrame, windows: list[pd.DataFrame]) -> Named:
    """`ValueDrift` of each column, which its drift preset makes of them: the normed Wasserstein distance at 0.1."""
    package, metrics = importlib.import_module("evidently"), importlib.import_module("evidently.metrics")
    columns = list(reference.columns)
    found = []
    for window in windows:
        report = package.Report([metrics.ValueDrift(column=column) for column in columns])
        result = json.loads(report.run(window, reference).json())
        named = []
        for metric in result["metrics"]:
            settings = metric["config"]
            if "distance" not in settings["method"]:
                raise ValueError(
                    f"evidently chose {settings['method']!r} for {settings['column']}; a distance was meant"
                )
            if metric["value"] >= settings["threshold"]:
                named.append(settings["column"])
        found.append(named)
    return found


def nannyml(reference: pd.DataFrame, windows: list[pd.DataFrame]) -> Named:
    """`UnivariateDriftCalculator`: Jensen-Shannon, three standard deviations of the reference's chunks of a window."""
    package = importlib.import_module("nannyml")
    columns = list(reference.columns)
    size = len(windows[0])
    calculator = package.UnivariateDriftCalculator(column_names=columns, chunk_size=size)
    calculator.fit(reference[columns])
    data = pd.concat(windows)[columns].reset_index(drop=True)
    table = calculator.calculate(data).filter(period="analysis").to_df()
    alerts = {column: table[column, "jensen_shannon", "alert"].to_numpy() for column in columns}
    return [[column for column in columns if alerts[column][w]] for w in range(len(windows))]


def whylogs(reference: pd.DataFrame, windows: list[pd.DataFrame]) -> Named:
    """`calculate_drift_scores` of profiles: Kolmogorov-Smirnov, p below 0.05."""
    package = importlib.import_module("whylogs")
    scores = importlib.import_module("whylogs.viz.drift.column_drift_algorithms").calculate_drift_scores
    before = package.log(reference).view()
    found = []
    for window in windows:
        result = scores(package.log(window).view(), before, with_thresholds=True)
        found.append([column for column, score in result.items() if score["drift_category"] == "DRIFT"])
    return found


def pooled_ks(reference: pd.DataFrame, windows: list[pd.DataFrame]) -> Named:
    """`scipy.stats.ks_2samp` on each column of each window, 5 % over the columns by Bonferroni."""
    test = importlib.import_module("scipy.stats").ks_2samp
    level = 0.05 / len(reference.columns)

    def drifted(window: pd.DataFrame, column: str) -> bool:
        return bool(test(window[column].dropna(), reference[column].dropna()).pvalue <= level)

    return [[column for column in reference.columns if drifted(window, column)] for window in windows]


def cbpe(reference: pd.DataFrame, windows: list[pd.DataFrame]) -> list[tuple[float, bool]]:
    """NannyML's `CBPE`: the accuracy that scores promise, calibrated on the reference's labels if that helps."""
    package = importlib.import_module("nannyml")
    estimator = package.CBPE(
        problem_type="classification_binary",
        y_pred_proba="score",
        y_pred="prediction",
        y_true="label",
        metrics=["accuracy"],
        chunk_size=len(windows[0]),
    )
    estimator.fit(reference)
    data = pd.concat(windows).drop(columns="label").reset_index(drop=True)
    table = estimator.estimate(data).filter(period="analysis").to_df()
    values, alerts = (table["accuracy", what].to_numpy() for what in ("value", "alert"))
    return [(float(value), bool(alert)) for value, alert in zip(values, alerts, strict=True)]


PEERS: dict[str, Callable[[pd.DataFrame, list[pd.DataFrame]], Any]] = {
    "cbpe": cbpe,
    "evidently": evidently,
    "nannyml": nannyml,
    "whylogs": whylogs,
    "scipy": pooled_ks,
}


def main() -> int:
    peer, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    warnings.simplefilter("ignore")
    for fleet in sorted(path for path in folder.iterdir() if path.is_dir()):
        if names and fleet.name not in names:
            continue
        reference = pd.read_parquet(fleet / "reference.parquet").drop(columns="window")
        data = pd.read_parquet(fleet / "data.parquet")
        windows = [window.drop(columns="window") for _, window in data.groupby("window")]
        started = time.perf_counter()
        found = PEERS[peer](reference, windows)
        seconds = round(time.perf_counter() - started, 2)
        print(json.dumps({"fleet": fleet.name, "windows": found, "seconds": seconds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

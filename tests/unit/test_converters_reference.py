"""The pipeline is asked on one thread, whatever it was fitted with."""

import joblib
import numpy as np
from sklearn.ensemble import RandomForestClassifier
from threadpoolctl import threadpool_info, threadpool_limits

from converters import signature as signatures
from converters.reference import ask


def test_scikit_learn_stays_on_the_calling_thread(monkeypatch):
    X = np.random.default_rng(0).normal(size=(60, 3))
    forest = RandomForestClassifier(5, n_jobs=-1, random_state=0).fit(X, X[:, 0] > 0)
    signature = signatures.read(forest)
    seen = []

    def watched(rows, predict=forest.predict):
        loops = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"]
        seen.append((loops, joblib.effective_n_jobs(-1)))
        return predict(rows)

    monkeypatch.setattr(forest, "predict", watched, raising=False)
    with threadpool_limits(2, user_api="openmp"):
        watched(X)
        ask(signature, X)
        watched(X)
    (outside, _), (inside, jobs), (after, _) = seen
    assert set(outside) == set(after) == {2}
    assert set(inside) == {1}
    assert jobs == 1

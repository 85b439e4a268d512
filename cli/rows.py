"""Training rows from files: ``.npy``, ``.npz``, ``.csv`` and ``.parquet``."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from cli.texts import MISSING, listed
from converters import signature as signatures
from converters.categories import known_values
from converters.signature import Signature
from edge_runtime.contract.errors import ConfigError, InputError

SUFFIXES: Final = (".npy", ".npz", ".csv", ".parquet")

_TRIED: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to take besides the rows, and what to leave out.

    ``target`` and ``groups`` name a column, an array of the ``.npz`` file, or another ``.npy`` file; ``drop`` columns.
    """

    target: str = ""
    groups: str = ""
    drop: Sequence[str] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """The names that are no columns of a pipeline that was fitted without names."""
        return tuple(name for name in (self.target, self.groups, *self.drop) if name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingRows:
    """Rows X (n, F) as the pipeline takes them; y (n,) and groups (n,) where they were asked for."""

    X: Any
    y: Any = None
    groups: Any = None


def load_rows(path: Path, pipeline: Any, wanted: Wanted) -> TrainingRows:
    """The training rows of ``pipeline`` in ``path``.

    Columns are chosen by the names that the pipeline was fitted with, in its order; without names all columns are taken
    but those that are ``wanted`` for something else or dropped.

    Raises:
        ConfigError: the file is of another kind, or something is asked for that it does not have.
        InputError: the file cannot be read, or lacks columns.
        UnsupportedPipeline: the pipeline is not fitted.
    """
    signature = signatures.read(pipeline)
    try:
        if path.suffix == ".csv":
            return _from_csv(path, signature, wanted)
        if path.suffix == ".parquet":
            return _from_frame(path, _parquet(path), signature, wanted)
        if path.suffix in (".npy", ".npz"):
            return _from_arrays(path, signature, wanted)
    except OSError as e:
        raise InputError("type", f"{path}: cannot be read ({e.strerror or e})") from e
    raise ConfigError(f"{path}: is of no known kind; training rows are read from {', '.join(SUFFIXES)}")


def _from_csv(path: Path, signature: Signature, wanted: Wanted) -> TrainingRows:
    names = [str(name) for name in _csv(path, nrows=0).columns]
    chosen = _chosen(path, names, signature, wanted.left_out)
    known = known_values(signature.pipeline, signature.width)
    words = {
        name: {value for value in values if isinstance(value, str)}
        for name, values in zip(chosen, known, strict=True)
    }
    frame = _csv(
        path,
        dtype={name: str for name, texts in words.items() if texts},
        keep_default_na=False,
        na_values={name: sorted(MISSING - words.get(name, set())) for name in names},
        low_memory=False,
    )
    rows = _from_frame(path, frame, signature, wanted)
    return TrainingRows(X=_as_fitted(signature, rows.X), y=rows.y, groups=rows.groups)


def _csv(path: Path, **options: Any) -> Any:
    import pandas as pd

    try:
        return pd.read_csv(path, encoding="utf-8-sig", **options)
    except ValueError as e:  # pandas' own errors and those of decoding are ValueErrors
        raise InputError("type", f"{path}: is not a CSV file in UTF-8 ({' '.join(str(e).split())})") from e


def _parquet(path: Path) -> Any:
    import pandas as pd

    try:
        return pd.read_parquet(path, engine="pyarrow")
    except ImportError as e:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from e
    except ValueError as e:  # pyarrow's ArrowInvalid is one
        raise InputError("type", f"{path}: is not a Parquet file ({' '.join(str(e).split())})") from e


def _from_frame(path: Path, frame: Any, signature: Signature, wanted: Wanted) -> TrainingRows:
    frame.columns = [str(name) for name in frame.columns]
    names = list(frame.columns)
    return TrainingRows(
        X=frame[_chosen(path, names, signature, wanted.left_out)],
        y=_beside(path, wanted.target, frame, names),
        groups=_beside(path, wanted.groups, frame, names),
    )


def _from_arrays(path: Path, signature: Signature, wanted: Wanted) -> TrainingRows:
    import pandas as pd

    loaded = _arrays(path)
    if isinstance(loaded, np.ndarray):
        if wanted.drop:
            raise ConfigError(f"{path}: has no column names, so --drop {wanted.drop[0]} names nothing")
        return TrainingRows(
            X=loaded, y=_beside(path, wanted.target, {}, ()), groups=_beside(path, wanted.groups, {}, ())
        )
    features = loaded.get("features", loaded.get("X"))
    if features is None:
        raise InputError("type", f"{path}: has no array 'features' or 'X', only {listed(loaded)}")
    y, membership = _beside(path, wanted.target, loaded, loaded), _beside(path, wanted.groups, loaded, loaded)
    if "feature_names" not in loaded:
        return TrainingRows(X=features, y=y, groups=membership)
    names = [str(name) for name in loaded["feature_names"].ravel()]
    if features.ndim != 2 or features.shape[1] != len(names):
        raise InputError(
            "width", f"{path}: 'features' has shape {features.shape}, but there are {len(names)} names"
        )
    chosen = _chosen(path, names, signature, tuple(wanted.drop))
    return TrainingRows(X=pd.DataFrame(features, columns=names)[chosen], y=y, groups=membership)


def _arrays(path: Path) -> Any:
    """The array of a ``.npy`` file, or the arrays of an ``.npz`` file by name."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return {name: found[name] for name in found.files}
    except (ValueError, EOFError, KeyError) as e:
        hint = "; save text as .csv or .parquet" if "allow_pickle" in str(e) else ""
        raise InputError("type", f"{path}: is not a readable {path.suffix} file ({e}){hint}") from e


def _chosen(path: Path, names: Sequence[str], signature: Signature, left_out: Sequence[str]) -> list[str]:
    """The columns to take, in the pipeline's order."""
    if signature.names:
        lacking = [name for name in signature.names if name not in names]
        if lacking:
            raise InputError(
                "missing",
                f"{path}: lacks {listed(lacking)}, which the pipeline was fitted with; it has {listed(names)}",
            )
        return list(signature.names)
    for name in left_out:
        if name not in names and not name.endswith(".npy"):
            raise ConfigError(f"{path}: has no column {name!r} to leave out, only {listed(names)}")
    found = [name for name in names if name not in left_out]
    if len(found) != signature.width:
        raise InputError(
            "width",
            f"{path}: {len(found)} columns for a pipeline that takes {signature.width} and was fitted without names "
            f"({listed(found)}); leave some out with --target, --groups or --drop",
        )
    return found


def _beside(path: Path, name: str, columns: Mapping[str, Any] | Any, names: Collection[str]) -> Any:
    """The column, array or ``.npy`` file that ``name`` names; None where nothing is asked for."""
    if not name:
        return None
    if name in names:
        return np.asarray(columns[name])
    if name.endswith(".npy"):
        return _arrays(Path(name))
    has = f"only {listed(names)}" if names else "being one array; name another .npy file"
    raise ConfigError(f"{path}: has no {name!r}, {has}")


def _as_fitted(signature: Signature, frame: Any) -> Any:
    """``frame``, its text as pandas categories where the pipeline takes it only so: a CSV file knows no dtypes."""
    import pandas as pd

    texts = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name].dtype)]
    if not texts or _takes(signature, frame):
        return frame
    categories = frame.astype(dict.fromkeys(texts, "category"))
    return categories if _takes(signature, categories) else frame


def _takes(signature: Signature, frame: Any) -> bool:
    try:
        with signatures.by_position():
            signature.pipeline.predict(frame.head(_TRIED))
    except (ValueError, TypeError, KeyError):
        return False
    return True

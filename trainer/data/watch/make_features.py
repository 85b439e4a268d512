"""Make ``watch_features.npz`` from the smart-watch recordings that ship inside seglearn.

Run once, by hand, when the data set is made or checked; nothing in skiff imports it::

    pip download --no-deps seglearn==1.2.5
    python trainer/data/watch/make_features.py seglearn-1.2.5-py3-none-any.whl

``--check`` compares with the file that is there instead of writing one.

The source is a pickled dictionary, and unpickling runs code: its SHA-256 is compared with the one published in
seglearn 1.2.5 before a byte of it is unpickled. The output holds plain arrays and loads with ``allow_pickle=False``.
"""

import argparse
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SOURCE_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
SOURCE_NAME = "watch_dataset.npy"
SOURCE_CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
CHANNELS = ("accel_x", "accel_y", "accel_z", "gyro_x", "gyro_y", "gyro_z")
STATISTICS = ("mean", "std", "min", "max", "mean_abs_diff")
FEATURE_NAMES = tuple(f"{channel}_{statistic}" for channel in CHANNELS for statistic in STATISTICS)

SAMPLE_RATE_HZ = 50
WINDOW_SAMPLES = 100
STRIDE_SAMPLES = 10
MANTISSA_BITS = 11

_FLOAT32_MANTISSA_BITS = 23
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)

Arrays = dict[str, NDArray[Any]]


def read_source(path: Path) -> bytes:
    """Return the bytes of the source array in a wheel, a source distribution or a bare ``.npy``.

    Raises:
        ValueError: the file holds no watch data set, or not the one of seglearn 1.2.5.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(f"/{SOURCE_NAME}")]
            payload = archive.read(members[0]) if members else b""
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            found = [member for member in archive.getmembers() if member.name.endswith(f"/{SOURCE_NAME}")]
            stream = archive.extractfile(found[0]) if found else None
            payload = stream.read() if stream else b""
    else:
        payload = path.read_bytes()
    digest = hashlib.sha256(payload).hexdigest()
    if digest != SOURCE_SHA256:
        raise ValueError(
            f"{path}: no {SOURCE_NAME} of seglearn 1.2.5 in it (SHA-256 {digest}, expected {SOURCE_SHA256}); "
            "get it with `pip download --no-deps seglearn==1.2.5`"
        )
    return payload


def round_mantissa(values: NDArray[np.float64], bits: int = MANTISSA_BITS) -> NDArray[np.float32]:
    """Round to float32 with ``bits`` stored mantissa bits, half to even: a relative error of at most 2**-(bits + 1).

    Besides halving the file this removes the last-digit differences between platforms' summation orders.
    """
    drop = _FLOAT32_MANTISSA_BITS - bits
    raw = values.astype(np.float32).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    odd = (raw >> np.uint32(drop)) & np.uint32(1)
    mask = np.uint32(0xFFFFFFFF ^ ((1 << drop) - 1))
    rounded = ((raw + half + odd) & mask).view(np.float32)
    return np.where(rounded == 0.0, np.float32(0.0), rounded)


def window_features(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the features (windows, 30) of one recording (samples, 6); a tail shorter than a stride is dropped."""
    views = np.lib.stride_tricks.sliding_window_view(series, WINDOW_SAMPLES, axis=0)[::STRIDE_SAMPLES]
    statistics = (
        views.mean(axis=-1),
        views.std(axis=-1),
        views.min(axis=-1),
        views.max(axis=-1),
        np.abs(np.diff(views, axis=-1)).mean(axis=-1),
    )
    return np.stack(statistics, axis=-1).reshape(len(views), len(FEATURE_NAMES))


def make_arrays(source: Mapping[str, Any]) -> Arrays:
    """Return the arrays of the feature file, rows in the source's order: by recording, then by time."""
    if tuple(source["X_labels"]) != SOURCE_CHANNELS:
        raise ValueError(f"X_labels: expected {SOURCE_CHANNELS}, found {source['X_labels']}")
    blocks = [window_features(np.asarray(series, dtype=np.float64)) for series in source["X"]]
    lengths = [len(block) for block in blocks]

    def per_row(values: ArrayLike) -> NDArray[np.uint8]:
        return np.repeat(np.asarray(values).astype(np.uint8), lengths)

    return {
        # Column order: neighbouring windows share samples, so a column compresses far better than a row.
        "features": np.asfortranarray(round_mantissa(np.concatenate(blocks))),
        "label": per_row(source["y"]),
        "label_names": np.array(source["y_labels"], dtype=np.str_),
        "person": per_row(source["subject"]),
        "wrist": per_row(source["side"]),
        "recording": per_row(np.arange(len(blocks))),
        "feature_names": np.array(FEATURE_NAMES, dtype=np.str_),
    }


def encode_npz(arrays: Arrays) -> bytes:
    """Return an ``.npz`` whose bytes depend on the arrays and the deflate library only: no clock, no host."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_TIME)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3
            member.external_attr = 0o644 << 16
            payload = io.BytesIO()
            np.lib.format.write_array(payload, array, version=(1, 0), allow_pickle=False)
            archive.writestr(member, payload.getvalue(), compresslevel=9)
    return buffer.getvalue()


def describe_difference(made: Arrays, path: Path) -> list[str]:
    """Return one line for every array of the file at ``path`` that differs from ``made``; none means equal."""
    with np.load(path, allow_pickle=False) as kept:
        names = [name for name in made if name in kept.files]
        lines = [f"{name}: only on one side" for name in sorted(set(made) ^ set(kept.files))]
        lines.extend(
            f"{name}: values differ"
            for name in names
            if made[name].dtype != kept[name].dtype or not np.array_equal(made[name], kept[name])
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with ``--check`` verify, the feature file; return the exit code."""
    parser = argparse.ArgumentParser(description="Make watch_features.npz from seglearn 1.2.5.")
    parser.add_argument("source", type=Path, help="seglearn wheel, sdist, or its watch_dataset.npy")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("watch_features.npz"))
    parser.add_argument("--check", action="store_true", help="compare with the file at --out; write nothing")
    options = parser.parse_args(argv)
    try:
        payload = read_source(options.source)
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        print(f"make_features: {error}", file=sys.stderr)
        return 1
    arrays = make_arrays(np.load(io.BytesIO(payload), allow_pickle=True).item())
    if options.check:
        differences = describe_difference(arrays, options.out)
        for line in differences:
            print(f"{options.out}: {line}", file=sys.stderr)
        return 1 if differences else 0
    encoded = encode_npz(arrays)
    options.out.write_bytes(encoded)
    print(f"{options.out}: {len(arrays['features'])} rows, {len(encoded)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

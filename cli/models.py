"""Commands about models: ``train``, ``convert``, ``parity``, ``inspect``; and the table of what was proven."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from cli.output import FAILED, REFUSED, err, out, print_json, progress, reported
from converters import ParityReport, check_parity, convert
from edge_runtime.contract.errors import ArtifactError, ConfigError, InputError
from edge_runtime.contract.ids import digest_of
from edge_runtime.contract.manifest import ArtifactInfo, read_info
from trainer.release import Made, run
from trainer.spec import load as load_spec

JsonFlag = Annotated[bool, typer.Option("--json", help="Print data for a machine on stdout.")]


def certificate_table(certificate: dict[str, Any]) -> Table:
    """What was proven, as a table: one row per kind of probe."""
    table = Table(
        "probe rows",
        "compared",
        "wrong labels",
        "wrong scores",
        "ties",
        "worst error",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, found in certificate["kinds"].items():
        table.add_row(*_proof_row(kind.replace("_", " "), found))
    table.add_section()
    table.add_row(*_proof_row("together", certificate), style="bold")
    return table


def _proof_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{found['rows']:,}",
        str(found["label_mismatches"]),
        str(found["score_mismatches"]),
        str(found["ties"]),
        f"{float(found['max_abs_error']):.1e}",
    )


def read_artifact(path: Path) -> tuple[bytes, ArtifactInfo]:
    """The bytes of an artifact and what they say of themselves; raises `ArtifactError`."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        return data, read_info(data)
    except ArtifactError as e:
        raise ArtifactError(f"{path}: {e}") from e


def load_pipeline(where: str) -> Any:
    """The fitted pipeline at ``module:attribute`` or in a ``.skops`` file; raises `ConfigError`.

    An attribute that can be called without being fitted is called to get the pipeline.
    """
    path = Path(where)
    if path.suffix == ".skops":
        import skops.io

        try:
            unknown = skops.io.get_untrusted_types(file=path)
            if unknown:
                raise ConfigError(
                    f"{path}: holds types that are not scikit-learn's own: {', '.join(unknown)}"
                )
            return skops.io.load(path)
        except OSError as e:
            raise ConfigError(f"{path}: cannot be read ({e.strerror})") from e
    module, colon, attribute = where.partition(":")
    if not colon:
        raise ConfigError(f"{where!r} is neither module:attribute nor a .skops file")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"{where}: {e}") from e
    return found() if callable(found) and not hasattr(found, "predict") else found


def load_rows(path: Path) -> Any:
    """Training rows: an array from ``.npy``, or ``features`` of an ``.npz`` as a table of named columns when it has
    ``feature_names``. Raises `InputError`.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        return found["features"]
    except (OSError, ValueError, KeyError) as e:
        raise InputError(
            "type", f"{path}: not a .npy array or a .npz file with an array 'features' ({e})"
        ) from e


def train(
    spec: Annotated[Path, typer.Argument(help="TOML file that says which data and which pipeline.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="Where to write the artifact.")] = Path(
        "model.onnx"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Fit a pipeline from a spec, evaluate it, convert it and prove the result."""
    with reported():
        with progress("train") as bar:
            made = run(load_spec(spec), output, progress=bar)
        _tell_made(made, as_json=as_json)


def _tell_made(made: Made, *, as_json: bool) -> None:
    report = made.artifact.report
    if as_json:
        print_json(
            {
                "path": str(made.artifact.path),
                "digest": made.artifact.digest,
                "measure": made.measure,
                "evaluation": dict(made.evaluation),
                "parity": json.loads(report.to_json()),
            }
        )
        return
    out.print(certificate_table(dict(report.to_certificate())))
    for name, accuracy in made.evaluation:
        out.print(f"{made.measure} on {name}: {accuracy:.3f}")
    out.print(f"wrote {made.artifact.path} ({made.artifact.digest})")


def convert_command(  # noqa: PLR0917 (typer calls it by name)
    pipeline: Annotated[str, typer.Argument(help="module:attribute, or a .skops file.")],
    rows: Annotated[Path, typer.Argument(help="Training rows: .npy, or .npz with an array 'features'.")],
    output: Annotated[Path, typer.Option("--out", "-o")] = Path("model.onnx"),
    name: Annotated[str, typer.Option(help="The model family.")] = "model",
    version: Annotated[str, typer.Option()] = "1.0.0",
    probes: Annotated[int, typer.Option(help="About how many rows to compare.")] = 100_000,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Convert a fitted pipeline into one .onnx file that is proven equal to it, or refuse."""
    with reported():
        with progress("convert") as bar:
            artifact = convert(
                load_pipeline(pipeline),
                load_rows(rows),
                out=output,
                name=name,
                version=version,
                probes=probes,
                seed=seed,
                progress=bar,
            )
        _tell_report(artifact.report, as_json=as_json)
        err.print(f"wrote {artifact.path} ({artifact.digest})")


def parity(  # noqa: PLR0917 (typer calls it by name)
    pipeline: Annotated[str, typer.Argument(help="module:attribute, or a .skops file.")],
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    rows: Annotated[Path, typer.Argument(help="Training rows: .npy, or .npz with an array 'features'.")],
    probes: Annotated[int, typer.Option()] = 100_000,
    seed: Annotated[int, typer.Option()] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page, too.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare an artifact with its pipeline on hostile rows; exit code 3 when they differ."""
    with reported():
        with progress("parity") as bar:
            report = check_parity(
                load_pipeline(pipeline), model, load_rows(rows), probes=probes, seed=seed, progress=bar
            )
        if html is not None:
            report.to_html(html)
        _tell_report(report, as_json=as_json)
        if not report.passed:
            raise typer.Exit(REFUSED)


def _tell_report(report: ParityReport, *, as_json: bool) -> None:
    if as_json:
        print_json(json.loads(report.to_json()))
    else:
        out.print(certificate_table(dict(report.to_certificate())))
        out.print(report.summary(), markup=False)


def inspect(
    model: Annotated[Path, typer.Argument(help="An artifact.")],
    as_json: JsonFlag = False,
) -> None:
    """Say what an artifact is, and what was proven of it, without loading its graph."""
    with reported():
        data, info = read_artifact(model)
        m = info.manifest
        facts = {
            "model": f"{m.name} {m.version}",
            "digest": digest_of(data),
            "bytes": len(data),
            "task": m.task,
            "score": m.score,
            "features": [f.name for f in m.features],
            "labels": list(m.labels),
            "layout": m.layout,
            "training rows": info.reference.total.rows,
            "groups": {name: profile.rows for name, profile in info.reference.groups},
            "golden rows": len(info.golden.rows),
            "opset": m.opset,
            "libraries": dict(m.libraries),
        }
        if as_json:
            print_json({**facts, "certificate": info.certificate})
            return
        for key, value in facts.items():
            shown = value
            if isinstance(value, dict):
                shown = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, list):
                shown = ", ".join(str(v) for v in value)
            out.print(f"{key:14} {shown}", markup=False)
        out.print(certificate_table(dict(info.certificate)))
        if not info.certificate.get("passed"):
            raise typer.Exit(FAILED)

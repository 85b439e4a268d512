"""Commands about models: ``train``, ``convert``, ``parity``, ``inspect``; and the table of what was proven."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.output import FAILED, REFUSED, JsonFlag, note, out, print_json, progress, reported
from cli.pipelines import load_pipeline
from cli.proof import tell_certificate, tell_report
from cli.ranges import parse_ranges
from cli.rows import Wanted, load_rows
from converters import check_parity, convert
from converters.parity import ParityFailure
from converters.report import ranges_of
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.ids import digest_of
from edge_runtime.contract.manifest import ArtifactInfo, Budgets, read_info
from trainer.release import Made, run
from trainer.spec import load as load_spec

PipelineArgument = Annotated[
    str,
    typer.Argument(
        help="module:attribute, a .skops file, or with --allow-pickle a .pkl, .pickle or .joblib file."
    ),
]
RowsArgument = Annotated[
    Path,
    typer.Argument(
        help="Training rows: .csv, .parquet, .npy, or .npz with an array 'features' or 'X' (and 'feature_names')."
    ),
]
TargetOption = Annotated[
    str, typer.Option(help="Column (.npz: array; or a .npy file) with the target: not part of the rows.")
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(help="Column to leave out, if the pipeline was fitted without names; repeat for more."),
]
ProbesOption = Annotated[int, typer.Option(help="About how many rows to compare.")]
SeedOption = Annotated[int, typer.Option(help="Fixes every row drawn.")]
PickleFlag = Annotated[
    bool, typer.Option("--allow-pickle", help="Read a pickle: this runs the code that its writer put there.")
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(help="Type that a .skops file may hold besides scikit-learn's own; repeat for more."),
]
HtmlOption = Annotated[Path | None, typer.Option(help="Write the report as a page, too.")]


class Dtype(StrEnum):
    """What devices send, as an option."""

    auto = "auto"
    float32 = "float32"
    float64 = "float64"


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
    tell_certificate(report.to_certificate())
    for name, accuracy in made.evaluation:
        out.print(f"{made.measure} on {name}: {accuracy:.3f}")
    out.print(f"wrote {made.artifact.path} ({made.artifact.digest})")


def convert_command(  # noqa: PLR0917 (typer calls it by name)
    pipeline: PipelineArgument,
    rows: RowsArgument,
    output: Annotated[Path, typer.Option("--out", "-o", help="Where to write the artifact.")] = Path(
        "model.onnx"
    ),
    name: Annotated[str, typer.Option(help="The model family.")] = "model",
    version: Annotated[str, typer.Option(help="The model's version.")] = "1.0.0",
    target: TargetOption = "",
    groups: Annotated[
        str,
        typer.Option(help="Column with the device, person or site of each row: one reference profile each."),
    ] = "",
    drop: DropOption = None,
    layout: Annotated[
        Path | None,
        typer.Option(
            help="Artifact that this one succeeds: its cells are kept, and drift history with them."
        ),
    ] = None,
    input_dtype: Annotated[
        Dtype, typer.Option(help="What devices send; auto is float32 unless that changes answers.")
    ] = Dtype.auto,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            help="NAME=LOW:HIGH: where the model is proven and used, other rows being refused; an empty side has no "
            "limit; repeat for more. 'training': the training rows' range, widened by as much on each side.",
        ),
    ] = None,
    max_p99_us: Annotated[
        float,
        typer.Option(min=0, help="Budget to declare: microseconds of CPU of a slow prediction; 0 is none."),
    ] = 0.0,
    max_rss_mb: Annotated[
        float, typer.Option(min=0, help="Budget to declare: megabytes of memory; 0 is none.")
    ] = 0.0,
    real_rows: Annotated[
        bool,
        typer.Option("--real-rows", help="Let training rows travel in the artifact, to be tried on devices."),
    ] = False,
    probes: ProbesOption = 100_000,
    seed: SeedOption = 0,
    allow_pickle: PickleFlag = False,
    trust: TrustOption = None,
    html: HtmlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a fitted pipeline into one .onnx file that is proven equal to it, or refuse."""
    with reported():
        declared = parse_ranges(ranges or ())
        found = load_pipeline(pipeline, allow_pickle=allow_pickle, trusted=trust or (), tell=note)
        training = load_rows(rows, found, Wanted(target=target, groups=groups, drop=drop or ()))
        cells = None if layout is None else read_artifact(layout)[1].reference.spec
        try:
            with progress("convert") as bar:
                artifact = convert(
                    found,
                    training.X,
                    out=output,
                    name=name,
                    version=version,
                    y=training.y,
                    groups=training.groups,
                    probes=probes,
                    seed=seed,
                    layout=cells,
                    budgets=Budgets(
                        predict_p99_ns=round(max_p99_us * 1e3), rss_bytes=round(max_rss_mb * 1e6)
                    ),
                    input_dtype=input_dtype.value,
                    ranges=declared,
                    real_rows=real_rows,
                    progress=bar,
                )
        except ParityFailure as e:
            tell_report(e.report, as_json=as_json, html=html)
            raise
        manifest = artifact.manifest
        tell_report(
            artifact.report,
            as_json=as_json,
            html=html,
            path=str(artifact.path),
            model=f"{manifest.name} {manifest.version}",
            layout=manifest.layout,
            input_dtype=manifest.input_dtype,
        )
        note(f"wrote {artifact.path} ({artifact.digest})")


def parity(  # noqa: PLR0917 (typer calls it by name)
    pipeline: PipelineArgument,
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    rows: RowsArgument,
    target: TargetOption = "",
    groups: Annotated[
        str, typer.Option(help="Column with the group of each row: not part of the rows.")
    ] = "",
    drop: DropOption = None,
    probes: ProbesOption = 100_000,
    seed: SeedOption = 0,
    allow_pickle: PickleFlag = False,
    trust: TrustOption = None,
    html: HtmlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare an artifact with its pipeline on hostile rows; exit code 3 when they differ."""
    with reported():
        found = load_pipeline(pipeline, allow_pickle=allow_pickle, trusted=trust or (), tell=note)
        training = load_rows(rows, found, Wanted(target=target, groups=groups, drop=drop or ()))
        with progress("parity") as bar:
            report = check_parity(found, model, training.X, probes=probes, seed=seed, progress=bar)
        tell_report(report, as_json=as_json, html=html)
        if not report.passed:
            raise typer.Exit(REFUSED)


def _range_text(name: str, ends: tuple[float | None, float | None]) -> str:
    low, high = ("" if end is None else f"{end:.9g}" for end in ends)
    return f"{name} {low}:{high}"


def _declared(budgets: Budgets) -> dict[str, float]:
    """The limits that there are, by their names in a training spec."""
    limits = {"predict_p99_us": budgets.predict_p99_ns / 1e3, "rss_mb": budgets.rss_bytes / 1e6}
    return {name: limit for name, limit in limits.items() if limit}


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
            "ranges": {name: list(ends) for name, ends in ranges_of(m).items()},
            "labels": list(m.labels),
            "budgets": _declared(m.budgets),
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
            if key == "ranges":
                shown = ", ".join(_range_text(*f) for f in ranges_of(m).items())
            elif isinstance(value, dict):
                shown = ", ".join(f"{k} {v}" for k, v in value.items())
            elif isinstance(value, list):
                shown = ", ".join(str(v) for v in value)
            out.print(f"{key:14} {shown}", markup=False)
        tell_certificate(info.certificate)
        if not info.certificate.get("passed"):
            raise typer.Exit(FAILED)

"""Commands of the operator: ``publish``, ``serve``, ``fleet``, ``rollout``, ``retrain``."""

import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from aggregator.adapters.registry import Registry
from aggregator.config import AggregatorConfig
from aggregator.config import load as load_aggregator
from aggregator.records import DeviceTruth
from aggregator.service import Service
from cli.digests import digest_among, published_in
from cli.orders import order
from cli.output import JsonFlag, out, print_json, progress, reported, shown
from cli.pki import tell_expired
from cli.publishing import publish as send
from cli.retraining import Reweight, ReweightOption, aim_of, read_request, tell_made
from cli.view import FleetView
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.profile import CellSpec
from edge_runtime.contract.topics import CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from edge_runtime.mqtt.broker import Broker
from trainer.publish import Repository
from trainer.release import run as make
from trainer.spec import load as load_spec

ConfigArgument = Annotated[Path, typer.Argument(help="The aggregator's TOML file.")]

rollout_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Start, watch, pause, halt or take back a rollout."
)


def broker_of(config: AggregatorConfig) -> Broker:
    """The broker the aggregator uses, under the publisher's own identity."""
    b, who = config.broker, config.broker.publisher
    return Broker(
        host=b.host,
        port=b.port,
        username=who.username,
        password=who.password,
        ca=b.ca,
        certificate=who.certificate,
        key=who.key,
        keepalive_seconds=b.keepalive_seconds,
    )


def publish(
    artifact: Annotated[
        Path | None, typer.Argument(help="A proven artifact; none to renew the metadata only.")
    ] = None,
    *,
    repository: Annotated[Path, typer.Option("--repository", "-r", help="Made by `skiff pki init`.")],
    aggregator: Annotated[Path, typer.Option("--aggregator", "-a", help="The aggregator's TOML file.")],
    role: Annotated[
        str, typer.Option(help="Who vouches: 'targets' (offline keys) or 'auto' (builder key).")
    ] = "targets",
    chunk_kib: Annotated[
        int | None,
        typer.Option(
            min=MIN_CHUNK_BYTES >> 10,
            max=MAX_CHUNK_BYTES >> 10,
            help="KiB of the model in one message, below what the broker takes; signed with it, and kept until another "
            f"is asked for.  [default: {CHUNK_BYTES >> 10}]",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Sign nothing: put the metadata and every published model on a broker that has lost them.",
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Sign an artifact and put it, with the current metadata, on the broker.

    Without an artifact: sign snapshot and timestamp for another seven days. Do that at least once in seven days.
    """
    with reported():
        config = load_aggregator(aggregator)
        if again and artifact is not None:
            raise ConfigError("--again puts what is published there once more: name no artifact")
        found = Repository(repository)
        published = None
        if artifact is not None:
            size = chunk_kib << 10 if chunk_kib is not None else None
            published = found.add(artifact, role=role, chunk_bytes=size)
        elif not again:
            found.refresh()
        tell_expired(found)
        digests = [published.digest] if published is not None else []
        if again:
            digests = [p.digest for p in found.published()]
        with progress("publish") as bar:
            size = send(found, digests, fleet=config.fleet, broker=broker_of(config), progress=bar)
        if as_json:
            print_json({"digests": digests, "bytes_sent": size})
        elif published is not None:
            out.print(
                f"published {published.model} {published.version} as {published.path} ({size / 1e3:.0f} kB sent)"
            )
            if not published.on_brokers:
                out.print(
                    "too large for a broker: devices need the address of a web server under [update] url"
                )
        elif again:
            out.print(f"put {len(digests)} models there again ({size / 1e3:.0f} kB sent)")
        else:
            out.print(f"renewed snapshot and timestamp ({size / 1e3:.0f} kB sent)")


def serve(
    config: ConfigArgument,
    log_level: Annotated[str, typer.Option(help="debug, info or warning.")] = "info",
) -> None:
    """Run the aggregator and the rollout coordinator until SIGTERM."""
    with reported():
        logging.basicConfig(
            level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
        )
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        Service(load_aggregator(config)).run(stop)


def fleet(config: ConfigArgument, model: str = "", as_json: JsonFlag = False) -> None:
    """Show the devices: who is online, what they serve, and how their last update ended."""
    with reported():
        view = FleetView(config)
        truths = {(truth.device, truth.digest): truth for truth in view.truths()}
        rows = [
            {
                "device": device.device,
                "online": device.online,
                "model": report.model,
                "state": report.state,
                "serving": report.serving or "",
                "outcome": report.outcome,
                "reason": report.reason,
                "shadow_rows": report.shadow_rows,
                "shadow_disagreed": report.shadow_disagreed,
                **_known(truths.get((device.device, report.serving)) if report.serving else None),
                **dict(device.attributes),
            }
            for device in view.devices()
            for report in device.models
            if not model or report.model == model
        ]
        if as_json:
            print_json(rows)
            return
        table = Table(
            *("device", "online", "model", "state", "serving", "accuracy", "last outcome"),
            box=box.SIMPLE,
            pad_edge=False,
        )
        for row in rows:
            table.add_row(
                str(row["device"]),
                "yes" if row["online"] else "no",
                str(row["model"]),
                str(row["state"]),
                str(row["serving"])[:12],
                f"{row['accuracy']:.3f} of {row['labelled']}" if row["labelled"] else "",
                shown(f"{row['outcome']} {row['reason']}{_shadow(row)}".strip()),
            )
        out.print(table)


def _shadow(row: Mapping[str, Any]) -> str:
    return f"; {row['shadow_disagreed']} of {row['shadow_rows']} rows otherwise" if row["shadow_rows"] else ""


def _known(truth: DeviceTruth | None) -> dict[str, Any]:
    """What is known of right answers of what the device serves, and the estimate's error on the same rows."""
    if truth is None:
        return {"labelled": 0, "accuracy": None, "estimate_error": None}
    missed = truth.expected - truth.compared_correct
    return {
        "labelled": truth.labelled,
        "accuracy": truth.correct / truth.labelled,
        "estimate_error": missed / truth.compared if truth.compared else None,
    }


def parse_stages(text: str) -> list[int | float]:
    """``3,0.25,1.0``: counts without a point, shares with one; raises `ConfigError`."""
    try:
        return [float(word) if "." in word else int(word) for word in text.split(",")]
    except ValueError as e:
        raise ConfigError(f"--stages {text!r}: give counts (3) and shares (0.25), the last 1.0") from e


@rollout_app.command("start")
def rollout_start(  # noqa: PLR0917 (typer calls it by name)
    config: ConfigArgument,
    digest: Annotated[str, typer.Argument(help="A published artifact's SHA-256, or what it begins with.")],
    model: Annotated[str, typer.Option(help="The model family.")],
    stages: Annotated[str, typer.Option(help="Counts and shares, the last 1.0.")] = "1,0.25,1.0",
    cohort: str = "main",
    by: Annotated[str, typer.Option(help="Who asks, for the audit log.")] = "operator",
    why: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
) -> None:
    """Offer an artifact to the first stage."""
    with reported():
        view = FleetView(config)
        candidate = digest_among(published_in(view.config.registry), digest)
        document = {"model": model, "candidate": candidate, "stages": parse_stages(stages), "cohort": cohort}
        out.print(order(view, "start_rollout", document, by=by, why=why))


@rollout_app.command("order")
def rollout_order(  # noqa: PLR0917 (typer calls it by name)
    config: ConfigArgument,
    what: Annotated[str, typer.Argument(help="halt, rollback, pause or resume.")],
    model: Annotated[str, typer.Option(help="The model family.")],
    cohort: str = "main",
    by: str = "operator",
    why: str = "",
) -> None:
    """Halt, take back, pause or resume the newest rollout."""
    with reported():
        out.print(order(FleetView(config), what, {"model": model, "cohort": cohort}, by=by, why=why))


@rollout_app.command("status")
def rollout_status(config: ConfigArgument, as_json: JsonFlag = False) -> None:
    """Show the rollouts, newest first."""
    with reported():
        rows = FleetView(config).table("rollouts")
        if as_json:
            print_json(rows)
            return
        table = Table(
            "rollout", "cohort", "model", "candidate", "state", "note", box=box.SIMPLE, pad_edge=False
        )
        for row in rows:
            document = row["document"]
            table.add_row(
                *(row["rollout"], row["cohort"], row["model"]),
                document["candidate"][:12],
                row["state"],
                document.get("note", ""),
            )
        out.print(table)


def layout_of(config: AggregatorConfig, digest: Digest) -> CellSpec:
    """The cells of a published artifact, which its successor inherits; raises `ConfigError`."""
    info = Registry(config.registry).info(digest)
    if info is None:
        raise ConfigError(f"{config.registry}: no artifact {digest} to inherit the cell layout from")
    return info.reference.spec


def retrain(  # noqa: PLR0917 (typer calls it by name)
    request: Annotated[Path, typer.Argument(help="The request's JSON file, from the aggregator's hook.")],
    spec: Annotated[Path, typer.Option(help="TOML file that says which data and which pipeline.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="Where to write the artifact.")],
    repository: Annotated[Path, typer.Option("--repository", "-r")],
    aggregator: Annotated[Path, typer.Option("--aggregator", "-a", help="The aggregator's TOML file.")],
    stages: Annotated[str, typer.Option(help="Counts and shares, the last 1.0.")] = "1,0.25,1.0",
    reweight: ReweightOption = Reweight.auto,
) -> None:
    """Answer a retrain request: fit, prove, publish with the builder key, and start a staged rollout."""
    with reported():
        config = load_aggregator(aggregator)
        asked = read_request(request)
        layout = layout_of(config, asked.digest)
        found = Repository(repository)
        made = make(load_spec(spec), output, layout=layout, aim=aim_of(asked, layout, reweight))
        tell_made(made, asked)
        published = found.add(output, role="auto")
        send(found, [published.digest], fleet=config.fleet, broker=broker_of(config))
        document = {"model": published.model, "candidate": published.digest, "stages": parse_stages(stages)}
        name = order(FleetView(config), "start_rollout", document, by="retrain", why=asked.why)
        out.print(f"{made.artifact.digest} is offered in rollout {name}")

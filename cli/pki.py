"""`skiff pki`: the signing keys of a repository, and (`cli.enrol`) the certificates of a fleet."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from cli import enrol
from cli.digests import digest_among
from cli.output import EXIT_CODES, FAILED, JsonFlag, note, out, print_json, reported
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError
from trainer.change import Change, RoleState, Signers

if TYPE_CHECKING:
    from trainer.publish import Repository

RepositoryArgument = Annotated[Path, typer.Argument(help="Folder of the repository.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written and who must sign; write nothing.")
]
EXPIRES: Final = "%Y-%m-%d"


class PkiGroup(TyperGroup):
    """Says what became of ``skiff pki REPOSITORY``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with; a usage error otherwise."""
        if args and args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}. To make a repository: skiff pki init {args[0]}")
        return super().resolve_command(ctx, args)


pki_app = typer.Typer(
    cls=PkiGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Signing keys of a repository, certificates of a fleet.",
    epilog=EXIT_CODES,
)
for name, command in (
    ("ca", enrol.ca),
    ("server", enrol.server),
    ("device", enrol.device),
    ("service", enrol.service),
    ("devices", enrol.devices),
    ("revoke-device", enrol.revoke_device),
):
    pki_app.command(name, rich_help_panel="Certificates")(command)
repository_command = pki_app.command


@repository_command("init")
def init(
    repository: Annotated[Path, typer.Argument(help="Where the repository stands or is to stand.")],
    auto: Annotated[str, typer.Option(help="Let the builder key publish this model family on its own.")] = "",
) -> None:
    """Make the signing keys on first use, and say which have to go offline."""
    from trainer.publish import Repository

    with reported():
        known = (repository / "metadata").exists()
        found = Repository.create(repository)
        if auto and ids.model_name(auto) not in found.auto_models:
            found.enable_auto(ids.model_name(auto))
            out.print(f"the builder key alone may publish models of {auto} from now on", markup=False)
            if known:
                note(
                    f"devices believe it once they have the new metadata: skiff publish --repository {repository} "
                    "--aggregator AGGREGATOR.toml"
                )
        out.print(f"keys        {repository / 'keys'} (its README says which belong offline)", markup=False)
        out.print(f"pinned root {found.pinned_root} (devices are provisioned with it)", markup=False)
        out.print(f"    SHA-256 {ids.digest_of(found.first_root())}", markup=False)
        for role, moment in sorted(found.expiries().items()):
            out.print(f"{role:11} expires {moment:%Y-%m-%d}", markup=False)


@repository_command("anchor")
def anchor(
    repository: RepositoryArgument,
    digest: Annotated[
        str, typer.Argument(help="SHA-256 of root.json, from a device that you trust.", metavar="SHA256")
    ],
) -> None:
    """Have key files of an earlier skiff say which first root they belong to. Once, with every key here."""
    from trainer.publish import Repository

    with reported():
        changed = Repository.anchor(repository, ids.digest(digest))
        for name in changed:
            out.print(f"wrote {repository / 'keys' / name}", markup=False)
        note(
            "keep these files in the places of the old ones, offline keys too"
            if changed
            else "every key here says so already"
        )


@repository_command("show")
def show(repository: RepositoryArgument, as_json: JsonFlag = False) -> None:
    """Show every role: its keys, how many must sign, until when it is believed, which private keys are here."""
    from trainer.publish import Repository

    with reported():
        roles = Repository(repository, look=True).roles()
    if as_json:
        print_json({"roles": [_as_data(role) for role in roles]})
        return
    width = max(len(role.name) for role in roles)
    for role in roles:
        here = [file for _, file in role.keys if file]
        word = "expired" if _is_over(role.expires) else "until"
        until = f"{word} {role.expires:{EXPIRES}}" if role.expires else "no metadata"
        version = f"version {role.version}" if role.version else ""
        out.print(
            f"{role.name:{width}}  {role.threshold} of {len(role.keys)}  {version:10}  {until:16}  "
            f"here: {' '.join(here) or 'none'}",
            markup=False,
        )


def _is_over(expires: datetime | None) -> bool:
    return expires is not None and expires <= datetime.now(UTC)


def tell_expired(found: "Repository") -> None:
    """Says what of root and targets is believed no more: renewing snapshot and timestamp does not help there."""
    online = ("snapshot", "timestamp")
    for role, moment in sorted(found.expiries().items()):
        if role not in online and _is_over(moment):
            note(
                f"warning: {role} expired on {moment:{EXPIRES}}, devices take nothing new: skiff pki renew, with the "
                "offline keys"
            )


def _as_data(role: RoleState) -> dict[str, object]:
    keys = [{"keyid": keyid, "file": file or None} for keyid, file in role.keys]
    return {
        "role": role.name,
        "version": role.version,
        "expires": role.expires,
        "expired": _is_over(role.expires),
        "threshold": role.threshold,
        "keys": keys,
    }


@repository_command("rotate")
def rotate(
    repository: RepositoryArgument,
    role: Annotated[str, typer.Argument(help="root, targets, snapshot, timestamp, builder or director.")],
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Replace the keys of a role with new ones; devices follow. Copy the old ones back for it, they are gone then."""
    _change(repository, lambda found: found.rotate(role, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@repository_command("threshold")
def threshold(
    repository: RepositoryArgument,
    role: Annotated[str, typer.Argument(help="root or targets.")],
    number: Annotated[int, typer.Argument(help="How many keys must sign from now on.", metavar="N")],
    *,
    keys: Annotated[
        int | None, typer.Option(help="How many keys there are to be; new ones are made.", min=1)
    ] = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Change how many keys of root or targets must sign, and how many there are; devices follow."""
    _change(
        repository,
        lambda found: found.resize(role, number, keys or 0, dry_run=dry_run),
        dry_run=dry_run,
        as_json=as_json,
    )


@repository_command("renew")
def renew(repository: RepositoryArgument, dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """Sign everything for another year, with the offline keys: once a year."""
    _change(repository, lambda found: found.renew(dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@repository_command("refresh")
def refresh(repository: RepositoryArgument, dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """Sign snapshot and timestamp for another seven days; `skiff publish` without an artifact sends them as well."""

    def act(found: "Repository") -> Change:
        tell_expired(found)
        return found.refresh(dry_run=dry_run)

    _change(repository, act, dry_run=dry_run, as_json=as_json)


@repository_command("revoke")
def revoke(
    repository: RepositoryArgument,
    digests: Annotated[
        list[str], typer.Argument(help="Digests of models, or what they begin with.", metavar="DIGEST...")
    ],
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Have no device install these models any more. One that runs such a model leaves it when a release says so."""

    def act(found: "Repository") -> Change:
        return found.revoke(*_named(found, digests), dry_run=dry_run)

    _change(repository, act, dry_run=dry_run, as_json=as_json)


@repository_command("retire")
def retire(
    repository: RepositoryArgument,
    digests: Annotated[
        list[str], typer.Argument(help="Digests of models, or what they begin with.", metavar="DIGEST...")
    ],
    *,
    aggregator: Annotated[
        Path | None,
        typer.Option(
            "--aggregator", "-a", help="The aggregator's TOML file: refuse what the fleet still needs."
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Take models that no device needs any more out of the metadata, to make room. They may be published again."""

    def act(found: "Repository") -> Change:
        wanted = _named(found, digests)
        if aggregator is not None:
            from cli.view import FleetView

            needed = FleetView(aggregator).needed()
            if still := [f"{digest}: {needed[digest]}" for digest in wanted if digest in needed]:
                raise ConfigError(f"{'; '.join(still)}: roll out another model there first")
        return found.retire(*wanted, dry_run=dry_run)

    _change(repository, act, dry_run=dry_run, as_json=as_json)


def _named(found: "Repository", texts: list[str]) -> list[ids.Digest]:
    """The digests that ``texts`` are, once a person was told which models that is."""
    known = {published.digest: published for published in found.published()}
    wanted = [digest_among(known, text) for text in texts]
    for digest in wanted:
        model = known.get(digest)
        what = f"{model.model} {model.version}" if model else "not published here, or revoked before"
        note(f"{digest}  {what}")
    return wanted


def _change(repository: Path, act: Callable[["Repository"], Change], *, dry_run: bool, as_json: bool) -> None:
    """Does ``act``, or says what it would do; a dry run of what could not be done ends with code 1."""
    from trainer.publish import Repository

    with reported():
        change = act(Repository(repository, look=dry_run))
    if as_json:
        print_json(asdict(change) | {"possible": change.possible, "dry_run": dry_run})
    else:
        for line in described(change):
            out.print(line, markup=False)
    if dry_run and not change.possible:
        note("it cannot be done like this: bring the missing keys back first")
        raise typer.Exit(FAILED)
    if not dry_run and change.metadata:
        note(
            f"devices learn of it with: skiff publish --repository {repository} --aggregator AGGREGATOR.toml"
        )


def described(change: Change) -> list[str]:
    """What ``change`` writes, a line for each file."""
    if not change.metadata:
        return [f"{change.purpose}: that is so already, nothing is written"]
    lines = [f"{change.purpose}:"]
    for written in change.metadata:
        who = "; ".join(_signers(group) for group in written.signers)
        lines.append(
            f"  metadata/{written.name}  version {written.version}, until {written.expires:{EXPIRES}}, {who}"
        )
    lines += [f"  keys/{name}  new" for name in change.new_keys]
    lines += [f"  keys/{name}  removed" for name in change.removed_keys]
    return lines


def _signers(group: Signers) -> str:
    here = " ".join(group.here) or "none"
    lacking = "" if group.enough else f", {group.threshold - len(group.here)} MISSING"
    return f"signed by {group.threshold} of {group.keys} {group.role} keys (here: {here}{lacking})"

"""The README's words are true: its program runs, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from cli.app import app

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/how-to/backtest.md",
    "docs/how-to/convert-a-pipeline.md",
    "docs/how-to/enrol-a-device.md",
    "docs/how-to/feed-rows.md",
    "docs/how-to/install-a-device.md",
    "docs/how-to/late-labels.md",
    "docs/how-to/publish-over-https.md",
    "docs/how-to/retrain.md",
    "docs/how-to/run-a-fleet.md",
    "docs/how-to/signing-keys.md",
    "docs/explanation/calibration.md",
    "docs/explanation/how-it-decides.md",
    "docs/explanation/real-data.md",
    "docs/explanation/speed.md",
    "docs/reference/aggregator.md",
    "docs/reference/training.md",
)


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readmes_program_runs(repository, tmp_path):
    [program] = blocks((repository / "README.md").read_text(encoding="utf-8"), "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary, label = done.stdout.splitlines()
    assert "0 wrong labels, 0 wrong scores" in summary
    assert label == "0"
    assert len(program.strip().splitlines()) <= 14


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_exists(repository, page):
    text = (repository / page).read_text(encoding="utf-8")
    targets = set(
        re.findall(r"^([a-z-]+):.*##", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    commands = group.commands
    for block in blocks(text, "sh"):
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["make"]:
                assert words[1] in targets, line
            elif words[:1] == ["skiff"]:
                command = commands[words[1]]
                if isinstance(command, TyperGroup):
                    command = command.commands[words[2]]
                options = {name for parameter in command.params for name in parameter.opts}
                assert {word for word in words if word.startswith("--")} <= options, line


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(repository, page):
    folder = (repository / page).parent
    for link in re.findall(r"\]\(([^)#]+)\)", (repository / page).read_text(encoding="utf-8")):
        if "://" not in link:
            assert (folder / link).exists(), link

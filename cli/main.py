"""Entry point of ``skiff``: says what to install when the host's extra is missing."""

import sys

_OURS = ("edge_runtime", "converters", "trainer", "aggregator", "cli")


def main() -> int:
    """Runs the command line; returns the exit code."""
    try:
        from cli.app import app
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] in _OURS:
            raise
        sys.stderr.write(
            f"skiff: {e.name} is not installed. The host's commands need the extra 'host': "
            "pip install 'skiff-edge[host]'. On a device, run skiffd.\n"
        )
        return 2
    app(prog_name="skiff")
    return 0


if __name__ == "__main__":
    sys.exit(main())

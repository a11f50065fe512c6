"""The command line: `streamlens`, or `python -m streamlens.cli`."""

from __future__ import annotations

import sys

__all__ = ["main"]

_LAB = frozenset({"joblib", "rich", "sklearn", "tensorboard", "typer"})


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: Always; its code is the command's. Where packages of the `lab` extra are
            missing, it says in one line what to install.
    """
    try:
        from streamlens.lab.commands import app

        app(prog_name="streamlens")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _LAB:
            raise
        sys.exit(
            f"streamlens: {missing} is not installed; the command line needs: pip install 'streamlens[lab]'"
        )


if __name__ == "__main__":
    main()

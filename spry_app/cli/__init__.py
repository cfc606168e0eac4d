"""The `spry` command: reads arguments, calls, and turns errors into one message and an exit status."""

from spry_app.cli.commands import app


def main() -> None:
    """Entry point of the console script."""
    app()


__all__ = ["app", "main"]

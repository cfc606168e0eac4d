"""Flower's entry point on the server. Everything is in spry_app.server, but for the planner's advice."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from spry_app.planner.choice import advise_all
from spry_app.server.run import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run."""
    run(grid, context, advise_all)

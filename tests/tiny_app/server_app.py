"""A ServerApp with Spry's run config and Spry's files but no model, for the launcher: `method` says how it ends."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    rounds, ending = int(context.run_config["num-server-rounds"]), context.run_config["method"]
    folder = Path(str(context.run_config["output-dir"])) / str(context.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    for round_ in range(rounds + 1):
        content = RecordDict({"config": ConfigRecord({"round": round_})})
        asked = [Message(content=content, message_type="train", dst_node_id=node) for node in nodes]
        answered = [reply for reply in grid.send_and_receive(asked) if reply.has_content()]
        row = {"round": round_, "rounds": rounds, "loss": 1 / (1 + round_), "accuracy": None, "refused": 0}
        row |= {"mib-up": 0.5 * round_, "mib-down": round_, "seconds": time.monotonic()}
        row |= {"asked": len(asked), "answered": len(answered)}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if ending == "raise":
            raise ValueError("data.label-field is 'mood', and no row has it.")
        if ending == "hang":
            time.sleep(600)

"""From the slope log of a run to its adapter, without its clients and their rows."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from spry_app.autodiff.directions import Tensors
from spry_app.config import RunConfig
from spry_app.data import label_names
from spry_app.errors import SpryError
from spry_app.methods import Layout, get_method
from spry_app.methods.global_state import GlobalState
from spry_app.models import difference, load_model, save_adapter, start_from
from spry_app.offline import set_offline
from spry_app.server.frame_file import load_frame
from spry_app.slope_log import exact_path, read
from spry_app.tasks import get_task


def rebuild(log: Path, folder: Path, model: str = "") -> int:
    """Write the adapter after the last round of `log` into `folder`; the number of that round.

    model: a local copy of the base model, in place of model.name of the run. Raises SpryError where the log cannot be
    read, the base model is another one, or the result is not, to the bit, what the server had.
    """
    header, entries = read(log)
    if missing := {"config", "units", "fingerprint", "digest"} - header.keys():
        raise SpryError(f"{log} is not a slope log: its first line has no {', '.join(sorted(missing))}.")
    config = RunConfig.from_flower(header["config"], chosen=header["config"])
    set_offline(config.offline)
    frame = load_frame(log.parent, config)
    labels, task = len(label_names(config.data)), get_task(config.data)
    adapted = load_model(config.model, config.adapter, labels, config.seed, model, frame, task)
    if found := difference(adapted.fingerprint, header["fingerprint"]):
        raise SpryError(
            f"The {found.what} here is not that of the run (fingerprint {found.here}, the run had {found.there}): pin "
            f"model.revision={config.model.revision!r}, or give a whole copy of it, 1_Pooling too, by --model."
        )
    if header["units"] != list(adapted.units):
        raise SpryError(f"{log} is of a model with the units {header['units']}; here it has {list(adapted.units)}.")
    method = get_method(config).on(Layout(adapted.depths(), len(adapted.blocks)), config.client)
    if config.adapter.path:
        start_from(adapted, config.adapter)
    state = GlobalState(adapted.tensors(), adapted.units, method, config)
    for entry, _ in entries:
        state.follow(entry)
    if entries and state.exact:
        state.optimizer.load(_exact(exact_path(log), state.exact))
    if state.digest() != (entries[-1][1] if entries else header["digest"]):
        raise SpryError(
            f"After round {state.round} the adapter rebuilt from {log} is not the one that the server had. Rebuild it "
            "with the versions and on the architecture of the run, and with its exact.safetensors where it has one."
        )
    save_adapter(adapted, state.tensors, folder)
    return state.round


def _exact(path: Path, names: set[str]) -> Tensors:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpryError(
            f'{path} cannot be read ({error}). In a run with head-gradient="exact" the head is no sum of slopes: its '
            "values are kept in that file, beside the log."
        ) from None
    return {name: tensors[name] for name in names & tensors.keys()}

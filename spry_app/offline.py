"""Whether this process may download: said once for all libraries that could. Nothing is loaded here."""

import os
import sys

_VARIABLE = "HF_HUB_OFFLINE"
_SWITCHES = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),  # asked at every call by transformers, tokenizers and PEFT
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
}
"""What libraries have read from the environment when they were imported."""


def _is_set(*variables: str) -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in variables)


_before, _asked = os.environ.get(_VARIABLE), _is_set(_VARIABLE, "TRANSFORMERS_OFFLINE")
"""As this process was started."""


def set_offline(wanted: bool) -> None:
    """From now on nothing is downloaded, if `wanted` or the environment of this process said so when it was started.

    A process that serves one run after the other is told by each. What is imported later reads the variable.
    """
    offline = wanted or _asked
    if offline:
        os.environ[_VARIABLE] = "1"
    elif _before is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = _before
    for module, names in _SWITCHES.items():
        for name in names if module in sys.modules else ():
            setattr(sys.modules[module], name, offline or _is_set(*names[1:]))


def advice(command: str) -> str:
    """End of a sentence on something that is not here: how to get it, where nothing is downloaded now; else empty."""
    if not _is_set(_VARIABLE, "TRANSFORMERS_OFFLINE"):
        return ""
    return (
        " Nothing is downloaded, as offline is true or HF_HUB_OFFLINE is set: get it on this machine beforehand, with "
        f"`{command}`, or name local files."
    )

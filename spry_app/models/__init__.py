"""Models: load and quantise a checkpoint, attach a PEFT adapter, name its units. No training, no messages."""

import logging

# On import, bitsandbytes recommends a package that downloads kernels; the layers here do not use them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from spry_app.models.adapted import AdaptedModel  # noqa: E402
from spry_app.models.blocks import Entering, NoPrefixError  # noqa: E402
from spry_app.models.fingerprint import difference  # noqa: E402
from spry_app.models.given import start_from  # noqa: E402
from spry_app.models.loading import load_base, load_model, save_adapter  # noqa: E402
from spry_app.models.subspace import SENT, Fixed  # noqa: E402

__all__ = [
    "SENT",
    "AdaptedModel",
    "Entering",
    "Fixed",
    "NoPrefixError",
    "difference",
    "load_base",
    "load_model",
    "save_adapter",
    "start_from",
]

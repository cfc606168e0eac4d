"""Everything that travels between server and clients. No other room builds or reads message content.

downlink  "arrays": adapter tensors  "update", "log", "frame": if any "config": round, client, units, fingerprint, flags
uplink    "arrays": values, gradients or nothing       "metrics": loss, counts, slopes    or "refusal": a sentence
"""

from spry_app.protocol.device import Device
from spry_app.protocol.records import (
    MalformedReply,
    Tensors,
    content_bytes,
    from_arrays,
    mismatch,
    said,
    size_bytes,
    to_arrays,
)
from spry_app.protocol.replies import (
    MOST_EXAMPLES,
    Introduction,
    Score,
    TrainReply,
    error_reason,
    lacks_memory,
    refusal,
    refusal_reason,
)
from spry_app.protocol.task import (
    EVALUATE,
    INTRODUCE,
    TRAIN,
    CatchUp,
    Task,
    expected_fingerprint,
    frame_in,
    introduction_request,
    with_frame,
)
from spry_app.slope_log import LARGEST

__all__ = [
    "EVALUATE",
    "INTRODUCE",
    "LARGEST",
    "MOST_EXAMPLES",
    "TRAIN",
    "CatchUp",
    "Device",
    "Introduction",
    "MalformedReply",
    "Score",
    "Task",
    "Tensors",
    "TrainReply",
    "content_bytes",
    "error_reason",
    "expected_fingerprint",
    "frame_in",
    "from_arrays",
    "introduction_request",
    "lacks_memory",
    "mismatch",
    "refusal",
    "refusal_reason",
    "said",
    "size_bytes",
    "to_arrays",
    "with_frame",
]

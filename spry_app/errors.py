"""The one error a user is meant to read, raised where a bad value enters, never for our own mistakes; and what other
libraries' errors mean.
"""

import errno
import os


class SpryError(Exception):
    """Bad input: says what was got, what is allowed and which key to change."""


class OutOfMemory(SpryError):
    """What was asked takes more memory than there is, or may be taken."""


def is_disk_full(error: Exception) -> bool:
    """Or a quota is; safetensors has that in words alone."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)

"""The Gaussian mechanism: bound what one client may say, and add noise that nobody else can know. Who bounds, who adds
noise and what it costs is decided on clients and server.
"""

from spry_app.privacy.mechanism import bounded, noisy
from spry_app.privacy.secret import Secret

__all__ = ["Secret", "bounded", "noisy"]

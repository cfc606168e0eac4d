"""Every run-config key: its meaning, unit, default and check. Nothing here loads a model or reads a file."""

from spry_app.config.presets import Scalar
from spry_app.config.run import RunConfig, keys
from spry_app.config.sections import (
    ADAPTER_KEYS,
    AdapterConfig,
    ClientConfig,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    PrivacyConfig,
    ServerConfig,
    StopConfig,
    TelemetryConfig,
    kebab,
)

__all__ = [
    "ADAPTER_KEYS",
    "AdapterConfig",
    "ClientConfig",
    "DataConfig",
    "ModelConfig",
    "NoiseConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "ServerConfig",
    "StopConfig",
    "TelemetryConfig",
    "kebab",
    "keys",
]

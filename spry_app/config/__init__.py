"""Every run-config key: its meaning, unit, default and check. Nothing here loads a model or reads a file."""

from spry_app.config.presets import Scalar
from spry_app.config.run import RunConfig, keys
from spry_app.config.section import kebab
from spry_app.config.sections import ADAPTER_KEYS, AdapterConfig, DataConfig, ModelConfig
from spry_app.config.training import (
    ClientConfig,
    NoiseConfig,
    PrivacyConfig,
    ServerConfig,
    StopConfig,
    TelemetryConfig,
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

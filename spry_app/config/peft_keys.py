"""From the configuration that PEFT saves with an adapter to the keys of `adapter` that make the same. Opens no file."""

import re
from collections.abc import Mapping
from typing import Any

from spry_app.config.presets import Scalar

_KINDS = {
    "LORA": "lora",
    "VERA": "vera",
    "IA3": "ia3",
    "LN_TUNING": "layernorm",
    "PROMPT_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
}
"""Not P_TUNING: what is saved of it is what its network has made, not the network."""
_NO_MATRIX = "dummy-target-modules"
"""PEFT's name for an adapter of no matrix at all."""


def adapter_keys(saved: Mapping[str, Any]) -> dict[str, Scalar]:
    """saved: adapter_config.json. Empty for an adapter that Spry does not train."""
    kind, targets = _KINDS.get(str(saved.get("peft_type"))), saved.get("target_modules")
    if kind == "lora" and targets == _NO_MATRIX:
        return {"adapter.kind": "bitfit" if saved.get("bias") == "all" else "none"}
    if kind is None:
        return {}
    keys: dict[str, Scalar] = {"adapter.kind": kind}
    if kind in ("lora", "vera"):
        keys["adapter.rank"] = int(saved["r"])
    if kind == "lora":
        ranks = saved.get("rank_pattern") or {}
        keys |= {
            "adapter.alpha": float(saved["lora_alpha"]),
            "adapter.rslora": bool(saved.get("use_rslora")),
            "adapter.dora": bool(saved.get("use_dora")),
            "adapter.bias": str(saved.get("bias", "none")),
            "adapter.rank-pattern": ",".join(f"{_plain(name)}:{rank}" for name, rank in ranks.items()),
        }
    if kind in ("lora", "vera", "ia3") and isinstance(targets, list):
        keys["adapter.targets"] = ",".join(sorted(targets))
    if kind in ("prompt", "prefix"):
        keys["adapter.virtual-tokens"] = int(saved["num_virtual_tokens"])
    return keys


def _plain(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern)

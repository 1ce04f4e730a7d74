"""Wan2.1's DiT, one implementation for bidirectional and causal use (spec: Wan2.1, official state-dict layout)."""

from mirai_dist.models.wan.kv_cache import Held, KVCache
from mirai_dist.models.wan.model import Capture, Clean, History, WanModel, WanOutput, WanShape

__all__ = ["Capture", "Clean", "Held", "History", "KVCache", "WanModel", "WanOutput", "WanShape"]

"""Loaded for every test."""

from __future__ import annotations

pytest_plugins = ["tests.plugin_no_network"]

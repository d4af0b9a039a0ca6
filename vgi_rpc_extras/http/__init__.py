"""Placeholder until the server half brings the real one."""

from __future__ import annotations

from .client import *  # noqa: F403

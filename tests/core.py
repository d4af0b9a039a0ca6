"""The module under test: `vgi_rpc`, or what VGI_RPC_CORE names (a vendored copy, say)."""

from __future__ import annotations

import importlib
import os

core = importlib.import_module(os.environ.get("VGI_RPC_CORE", "vgi_rpc"))

"""Wheel build hook: ship the type information of a one-file module.

A top-level module cannot carry a `py.typed` marker (PEP 561), so the wheel gets a stub package whose only file is a
byte copy of the module.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface[Any]):
    """Adds `vgi_rpc-stubs/__init__.pyi`; an editable wheel gets none, because the copy would go stale."""

    _work: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Copy first: hatchling moves a force-included path, so the module itself would go missing from the wheel."""
        if version == "editable":
            return
        self._work = tempfile.mkdtemp(prefix="vgi_rpc_stubs_")
        copy = os.path.join(self._work, "__init__.pyi")
        shutil.copyfile(os.path.join(self.root, "vgi_rpc.py"), copy)
        build_data["force_include"][copy] = "vgi_rpc-stubs/__init__.pyi"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary copy."""
        if self._work:
            shutil.rmtree(self._work, ignore_errors=True)

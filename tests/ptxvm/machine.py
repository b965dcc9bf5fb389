"""The PTX machine for tests: tokenmill.ptx.vm, in processes without torch too."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

package = importlib.util.find_spec("tokenmill")
if package is None or package.origin is None:
    pytest.skip("tokenmill is not installed", allow_module_level=True)
PACKAGE = Path(package.origin).parent

# From its file: tokenmill imports torch, and torch with CUDA loads a runtime of the machine's name.
_spec = importlib.util.spec_from_file_location("ptx_vm", PACKAGE / "ptx" / "vm.py")
assert _spec and _spec.loader
_interface = importlib.util.module_from_spec(_spec)
sys.modules["ptx_vm"] = _interface
_spec.loader.exec_module(_interface)
MachineError, Module, Report = _interface.MachineError, _interface.Module, _interface.Report

LIBRARY = Path(os.environ.get("PTXVM_LIBRARY") or PACKAGE / "_ptxvm" / "libcudart.so.13")
if not LIBRARY.exists():
    pytest.skip("no PTX machine: not a development build", allow_module_level=True)
machine = _interface.Machine(LIBRARY)

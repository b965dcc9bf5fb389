"""The PTX machine of the installed package, for all tests of a process."""

from __future__ import annotations

import ptxvm

MachineError, Module, Report = ptxvm.MachineError, ptxvm.Module, ptxvm.Report
machine = ptxvm.machine()
LIBRARY = machine.path

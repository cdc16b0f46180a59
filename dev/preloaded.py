"""
Airflow's command line in a process with modules loaded: ``python -m dev.preloaded a.module,another scheduler``.

With LocalExecutor each task is a fork of the scheduler, and each Dag file is read by a fork of the Dag processor. What
they all import costs a second of CPU each time; what their parent has imported costs nothing.
"""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    modules = sys.argv.pop(1).split(",")
    sys.argv[0] = "airflow"
    main = importlib.import_module("airflow.__main__").main
    for module in modules:
        importlib.import_module(module)
    main()

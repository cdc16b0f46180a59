"""A Python application that needs no Spark: it says which region it was given, and takes a second."""

import sys
import time

print(f"region {sys.argv[1]}", flush=True)
time.sleep(1)

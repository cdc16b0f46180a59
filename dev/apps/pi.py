"""
A PySpark application: estimates pi on the cluster for as many seconds as its argument says.

Gentle on purpose: it pauses between its batches, so that the demo runs on a small machine.
"""

from __future__ import annotations

import os
import random
import sys
import time

from pyspark.sql import SparkSession

BATCH = 20_000


def hits(seed: int) -> int:
    """Return how many of ``BATCH`` random points of the unit square lie in the quarter circle."""
    chance = random.Random(seed)
    return sum(chance.random() ** 2 + chance.random() ** 2 < 1 for _ in range(BATCH))


seconds = float(sys.argv[1])
jvm = os.getppid()
spark = SparkSession.builder.getOrCreate()
until = time.monotonic() + seconds
inside = batches = 0
while time.monotonic() < until and os.getppid() == jvm:  # a killed JVM does not take its Python along
    inside += spark.sparkContext.parallelize([batches, batches + 1], 2).map(hits).sum()
    batches += 2
    print(f"pi is about {4 * inside / (batches * BATCH):.4f} after {batches} batches", flush=True)
    time.sleep(2)
spark.stop()

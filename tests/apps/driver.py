"""
A PySpark application: sums on an executor, says on which cluster, sleeps, and ends as it is told.

Arguments: seconds to sleep, and then an exit code or ``raise``.
"""

import os
import sys
import time

from pyspark.sql import SparkSession

seconds, end = float(sys.argv[1]), sys.argv[2]
parent = os.getppid()

spark = SparkSession.builder.getOrCreate()
context = spark.sparkContext
total = context.parallelize(range(100), 1).sum()
print(f"master={context.master} app={context.applicationId} total={total}", flush=True)

until = time.monotonic() + seconds
while time.monotonic() < until and os.getppid() == parent:  # a killed JVM does not take its Python along
    time.sleep(0.1)
if end == "raise":
    raise RuntimeError("raised as told")
spark.stop()
sys.exit(int(end))

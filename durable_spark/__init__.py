"""Run Spark jobs from Apache Airflow: submitted once, followed from the triggerer, never twice."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"

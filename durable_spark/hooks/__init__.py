"""Hooks: the only code that speaks a cluster's protocol, one module per cluster."""

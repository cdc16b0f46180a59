"""Triggers: the asynchronous half of an operator, and the one feed per cluster that they all listen to."""

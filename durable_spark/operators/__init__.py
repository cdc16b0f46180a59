"""Operators: the synchronous half. They decide, submit, store and defer."""

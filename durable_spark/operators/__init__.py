"""Operators: the synchronous half. They decide, submit, store and defer; they never wait on a worker unless asked to."""

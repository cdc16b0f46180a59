"""What developers run beside the package: real servers for tests, the demo and benchmarks. Not shipped."""

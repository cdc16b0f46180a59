"""Example Dags. The tests and the demo run these very files."""

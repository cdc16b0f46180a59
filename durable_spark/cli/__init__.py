"""Commands that this package adds to the ``airflow`` command line."""

"""
The commands that ``airflow`` shows, as the provider's metadata names them.

The trap: every ``airflow`` command imports this module, so it imports nothing but Airflow's own parser. The work is
imported when its command is called.
"""

from __future__ import annotations

from airflow.cli.cli_config import (
    ARG_OUTPUT,
    ARG_VERBOSE,
    ARG_YES,
    ActionCommand,
    Arg,
    CLICommand,
    GroupCommand,
    lazy_load_command,
)

__all__ = ["get_commands"]

ARG_CONN_IDS = Arg(("conn_ids",), metavar="conn_id", nargs="+", help="Connection of a cluster; several may be given")
ARG_ALL = Arg(("--all",), help="Show the jobs that are followed, too", action="store_true")
ARG_KILL = Arg(("--kill",), help="Kill the orphans, after asking", action="store_true")
ARG_HOOK = Arg(
    ("--hook",),
    default="durable_spark.hooks.spark.SparkHook",
    help="Class path of the connections' hook, a JobHook (default: %(default)s)",
)


def get_commands() -> list[CLICommand]:
    """Return the commands."""
    orphans = ActionCommand(
        name="orphans",
        help="List, and kill, this deployment's jobs that no task instance follows",
        description=(
            "List the jobs on clusters that carry this deployment's label, still run or are kept for their end, and "
            "are followed by no task instance. With --kill, end them."
        ),
        func=lazy_load_command("durable_spark.cli.orphans.orphans"),
        args=(ARG_CONN_IDS, ARG_ALL, ARG_KILL, ARG_YES, ARG_HOOK, ARG_OUTPUT, ARG_VERBOSE),
    )
    return [GroupCommand(name="durable-spark", help="Look after the jobs of Durable Spark", subcommands=[orphans])]

"""``hpcpar job``: a job script for a cluster, checked before the queue refuses it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from hpcpar.jobs.scripts import LAUNCHERS, JobRequest, write_script
from hpcpar.jobs.sites import SITES, find_site

__all__ = ["job"]

_COUNT = click.IntRange(min=1)


@click.command(
    epilog="Example: hpcpar job --nodes 4 --ranks-per-node 8 --time 02:00:00 -- python train.py",
)
@click.option(
    "--site", type=click.Choice(list(SITES)), default="generic", show_default=True, help="Which cluster."
)
@click.option("--nodes", type=_COUNT, default=1, show_default=True, help="How many nodes.")
@click.option("--ranks-per-node", type=_COUNT, default=1, show_default=True, help="How many ranks on each.")
@click.option("--time", default="01:00:00", show_default=True, help="Limit: [days-]hours:minutes:seconds.")
@click.option("--cpus-per-rank", type=_COUNT, help="Cores of each rank; by default the node's, divided.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), help="GPUs on each node, one for each rank.")
@click.option("--account", help="Who pays; most sites want it.")
@click.option("--partition", help="By default what the site advises.")
@click.option("--qos", help="By default what the site advises.")
@click.option("--name", default="train", show_default=True, help="Of the job, and of its log.")
@click.option("--log", "log", metavar="PATTERN", help="File for what the job prints, such as %x-%j.log.")
@click.option("--requeue", is_flag=True, help="Stop before the limit, queue again, go on.")
@click.option(
    "--signal-before", type=_COUNT, metavar="SECONDS", help="Tell the ranks so long before the limit."
)
@click.option("--array", metavar="TASKS", help="Several jobs, such as 0-9 or 0-9%2 (two at a time).")
@click.option("--launcher", type=click.Choice(LAUNCHERS), help="By default the site's usual one.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the script to this file."
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def job(
    context: click.Context,
    /,
    site: str,
    output: Path | None,
    log: str | None,
    signal_before: int | None,
    command: tuple[str, ...],
    **wanted: Any,
) -> None:
    """Write a job script for Slurm that runs COMMAND, which comes after two dashes.

    The request is checked against the site's nodes. The script names the page whose advice it follows: read
    it, add your environment, and submit it with sbatch.
    """
    request = JobRequest(command, output=log, signal_before_s=signal_before, **wanted)
    script = write_script(find_site(site), request, _made_by(context, command))
    if output is None:
        click.echo(script, nl=False)
    else:
        output.write_text(script, encoding="utf-8")
        click.echo(f"{output}: submit it with: sbatch {shlex.quote(str(output))}")


def _made_by(context: click.Context, command: tuple[str, ...]) -> str:
    """The command line again, with what was given on it and no more; where it was written does not matter."""
    words = ["hpcpar", "job"]
    for parameter in context.command.params:
        name = parameter.name or ""
        is_given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if not isinstance(parameter, click.Option) or not is_given or name == "output":
            continue
        words.append(parameter.opts[0])
        if not parameter.is_flag:
            words.append(str(context.params[name]))
    return shlex.join([*words, "--", *command])

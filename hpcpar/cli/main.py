"""The command ``hpcpar`` and its subcommands, each in a file of its own.

A mistake of the user, be it in an option or in a file, ends in one line on standard error and exit status 2:
a job script can test for it, and nobody has to read a traceback to learn of a typing error.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import click

from hpcpar import __version__
from hpcpar.cli.bench import bench
from hpcpar.cli.doctor.command import doctor
from hpcpar.cli.info import info
from hpcpar.cli.job import job
from hpcpar.cli.output import is_first_process
from hpcpar.cli.schedule import schedule
from hpcpar.errors import HpcparError

__all__ = ["main"]


# Imported when they are asked for: they need h5py, and doctor must be able to say that it is broken.
_LATER = {"checkpoint": "hpcpar.cli.checkpoint"}


class _Commands(click.Group):
    """A group that reports mistakes in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands, in alphabetical order."""
        return sorted({*super().list_commands(ctx), *_LATER})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of that name, one that says why where it cannot be imported, or ``None``."""
        if cmd_name not in _LATER:
            return super().get_command(ctx, cmd_name)
        try:
            command = getattr(importlib.import_module(_LATER[cmd_name]), cmd_name)
        except ImportError as error:
            return _unavailable(cmd_name, error)
        return cast("click.Command", command)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit, as :meth:`click.Group.main` does."""
        run: Callable[[], Any] = partial(
            super().main, args, prog_name, complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            status: Any = run()
        except click.Abort:
            _fail("interrupted", status=128 + signal.SIGINT)
        except click.ClickException as error:
            # Under mpirun every rank makes it, and one line is enough. Any other status than 0 may have the
            # launcher end the first rank, before it has spoken.
            if not is_first_process():
                sys.exit(0)
            context = getattr(error, "ctx", None)
            _fail(error.format_message(), context.command_path if context else "hpcpar")
        except HpcparError as error:
            _fail(str(error))
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(status if isinstance(status, int) else 0)


def _unavailable(name: str, error: ImportError) -> click.Command:
    def explain(**ignored: object) -> None:
        raise click.ClickException(f"{name} cannot be loaded: {error}. `hpcpar doctor` may say more")

    anything = click.Argument(["ignored"], nargs=-1, type=click.UNPROCESSED)
    lenient = {"ignore_unknown_options": True}
    return click.Command(
        name, callback=explain, params=[anything], context_settings=lenient, short_help="(cannot be loaded)"
    )


def _fail(message: str, command: str = "hpcpar", status: int = 2) -> None:
    click.echo(f"{command}: error: {' '.join(message.split())}", err=True)
    sys.exit(status)


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(__version__, prog_name="hpcpar")
@click.pass_context
def main(context: click.Context) -> None:
    """Tools for training PyTorch models over MPI: before a job, around it, and when something is wrong."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(bench)
main.add_command(doctor)
main.add_command(info)
main.add_command(job)
main.add_command(schedule)

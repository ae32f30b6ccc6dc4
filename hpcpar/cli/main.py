"""The command ``hpcpar`` and its subcommands, each in a file of its own.

A mistake of the user, be it in an option or in a file, ends in one line on standard error and exit status 2:
a job script can test for it, and nobody has to read a traceback to learn of a typing error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click

from hpcpar import __version__
from hpcpar.cli.schedule import schedule
from hpcpar.errors import HpcparError

__all__ = ["main"]


class _Commands(click.Group):
    """A group that reports mistakes in one line."""

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
            _fail("interrupted")
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            _fail(error.format_message(), context.command_path if context else "hpcpar")
        except HpcparError as error:
            _fail(str(error))
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, command: str = "hpcpar") -> None:
    click.echo(f"{command}: error: {' '.join(message.split())}", err=True)
    sys.exit(2)


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(__version__, prog_name="hpcpar")
@click.pass_context
def main(context: click.Context) -> None:
    """Tools for training PyTorch models over MPI. None of them needs MPI or a second rank."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(schedule)

"""The command line: parse, call, print. Commands are imported when they are asked for, so that `otgen --help` stays instant."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from keyword import iskeyword

import click

from otgen import __version__
from otgen.errors import OtgenError

COMMANDS = ("compile", "diff", "doctor", "export", "import", "merge", "render", "show", "space", "tune", "why")
"""Each is the command of its name in the module of its name; ``import``, which Python keeps for itself, in ``import_``."""

INTERRUPTED = 130


class _Lazy(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        home = f"{name}_" if iskeyword(name) else name
        command: click.Command = getattr(import_module(f"otgen.cli.{home}"), home)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="otgen")
def otgen() -> None:
    """Generate, search and dispatch Triton kernels for entropic optimal transport.

    Exit codes: 0 success, 1 failure, 2 usage, 3 no valid variant, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An OtgenError becomes one line on stderr and its own exit code, a warning one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: click.echo(f"otgen: {message}", err=True)
            sys.exit(otgen.main(arguments, prog_name="otgen", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OtgenError as error:
        click.echo(f"otgen: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"otgen: {error}; name a place that can be read and written", err=True)
        sys.exit(OtgenError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("otgen: interrupted", err=True)
        sys.exit(INTERRUPTED)

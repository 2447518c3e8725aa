"""`calotype completion`: what makes a shell complete our commands."""

import click

from calotype.cli.output import Settings, common, say


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
def command(settings: Settings, shell: str) -> None:
    """Print what makes SHELL complete commands, options, VMs, tags and ids.

    For bash: `eval "$(calotype completion bash)"` in ~/.bashrc; zsh likewise; for fish: `calotype
    completion fish | source`.
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415

    from calotype.cli.main import cli  # noqa: PLC0415

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(cli, {}, "calotype", "_CALOTYPE_COMPLETE").source()
    if settings.as_json:
        say(settings, {"shell": shell, "script": script}, [])
    else:
        click.echo(script)

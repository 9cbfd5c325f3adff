"""The command `gpt2lora`: what people do with a trained model and with experiments."""

import importlib

import click

COMMANDS = ("compare", "dequantize", "export", "generate", "play")


class Group(click.Group):
    """A group that imports a subcommand only when it is called, or when its help is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"gpt2lora.commands.{name}").main


@click.command(cls=Group)
def main() -> None:
    """Compare experiments, and use what the pipeline trained."""


if __name__ == "__main__":
    main(prog_name="gpt2lora")

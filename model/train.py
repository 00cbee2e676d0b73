"""`python -m videofactory.model.train CONFIG [key=value…]`: train the model on a dataset."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

app = typer.Typer(
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

HELP_AFTER = (
    "CONFIG is a YAML file, or a name: [bold]miniature[/] (two CPU cores), [bold]full[/] (eight GPUs). key=value changes single "
    "settings: steps=1000 data.buckets.0.batch=2. All of them are in docs/training-reference.md.",
    "The same command goes on from the last checkpoint in `output`, as if it had not been interrupted. Ctrl-C ends after a checkpoint.",
    "python -m videofactory.model.train miniature",
    "python -m videofactory.model.train miniature steps=50 output=runs/try --dry-run",
    "torchrun --nproc-per-node 8 -m videofactory.model.train full data.dataset=data/dataset output=runs/full",
)


@app.command(epilog="\n\n".join(HELP_AFTER))
def main(
    config: Annotated[str, typer.Argument(help="a YAML file of settings, or the name of one that comes with the package")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="settings that differ from it")] = None,
    device: Annotated[str, typer.Option(help="auto: a GPU for every process if there are any; or cpu")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show what would be trained, and end")] = False,
) -> None:
    """Train the text-to-video model on a dataset's shards, resumably."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from .training.config import ConfigError, load_config
    from .training.data import BadClipsError
    from .training.processes import joined
    from .training.tensor_files import CheckpointError
    from .training.trainer import NotFiniteError, Trainer

    # A bar per model that is loaded says nothing that anyone waits for.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    logging.getLogger("videofactory").setLevel(logging.INFO)
    try:
        if device not in ("auto", "cpu"):
            raise ConfigError(f"--device is {device!r}; auto or cpu is wanted")
        settings = load_config(config, overrides or [])
        with joined(device) as processes:
            if not processes.main:
                logging.getLogger("videofactory").setLevel(logging.ERROR)
            trainer = Trainer(settings, processes)
            if processes.main:
                console.print(trainer.describe(), markup=False, soft_wrap=True)
            if dry_run:
                return
            finished = trainer.run()
            if processes.main and finished:
                console.print(f"{settings.steps} steps are done; everything is in {Path(settings.output)}", markup=False)
            if not finished:
                raise typer.Exit(130)
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        console.print(
            f"error: {first_line} Lower the batches of data.buckets (and raise optimiser.accumulate), set gradient_checkpointing, or "
            "share the weights out with parallel=fsdp",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from None
    except (ConfigError, CheckpointError, BadClipsError, NotFiniteError, ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()

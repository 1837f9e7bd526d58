"""`llama lm_eval`: the command line of EleutherAI's lm-evaluation-harness, with this runner's models."""

import click

from llama.evaluate.harness import lm_eval as run_harness


@click.command(
    "lm_eval",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run tasks of lm-evaluation-harness (extra "eval"): its own flags, with `meta_llama` as the default --model."""
    run_harness(list(arguments))

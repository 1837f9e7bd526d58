"""The command `llama`, also run as `python -m llama`."""

from llama.cli.bench import bench
from llama.cli.chat import chat
from llama.cli.command import CONTEXT, Group, run
from llama.cli.complete import complete
from llama.cli.conformance import conformance
from llama.cli.convert import convert
from llama.cli.inspect import inspect
from llama.cli.lm_eval import lm_eval
from llama.cli.perplexity import perplexity
from llama.cli.plan import plan
from llama.cli.serve import serve
from llama.cli.verify import verify

COMMANDS = [bench, chat, complete, conformance, convert, inspect, lm_eval, perplexity, plan, serve, verify]

app = Group("llama", commands=COMMANDS, context_settings=CONTEXT, help="Run Llama checkpoints in Meta's layout.")


def main() -> None:
    run(app)

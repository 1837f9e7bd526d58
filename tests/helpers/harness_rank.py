"""`python -m llama ...`, but lm-evaluation-harness skips its built-in tasks, which take seconds to read."""

from functools import partialmethod

from lm_eval.tasks import TaskManager

from llama.cli.main import main

if __name__ == "__main__":
    TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
    main()

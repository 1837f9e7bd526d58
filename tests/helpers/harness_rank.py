"""`python -m llama ...` without the harness's own tasks, because reading them takes seconds."""

from functools import partialmethod

from lm_eval.tasks import TaskManager

from llama.cli.main import main

if __name__ == "__main__":
    TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
    main()

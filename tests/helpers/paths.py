"""Where tests find things, and the PYTHONPATH of programs that they start."""

import os
from pathlib import Path

import llama_models
import mistral_common

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
HELPERS = ROOT / "tests" / "helpers"
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
DEMO = ROOT / "checkpoints" / "smollm2-135m-instruct"
DEMO_GGUF = DEMO.with_suffix(".gguf")

# Vocabularies as published: Meta's of Llama 2, which no package ships, Meta's of Llama 3, Mistral's first.
LLAMA2 = ROOT.parent / "shared" / "tokenizers" / "llama2.model"
LLAMA3 = Path(llama_models.__path__[0]) / "llama3" / "tokenizer.model"
MISTRAL = Path(mistral_common.__path__[0]) / "data" / "tokenizer.model.v1"

"""Commands that evaluate, on `llama.scoring`: perplexity of files, a look at single tokens, EleutherAI's harness."""

def perplexity(files: list[str], *, ckpt_dir: str) -> None:
    """Stub."""
    raise NotImplementedError(files)

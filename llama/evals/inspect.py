def inspect(text: str, *, ckpt_dir: str) -> None:
    """Stub."""
    raise NotImplementedError

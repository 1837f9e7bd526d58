def lm_eval(words: list[str]) -> None:
    """Stub."""
    raise NotImplementedError

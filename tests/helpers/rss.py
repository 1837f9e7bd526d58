"""How much memory a process holds itself."""

from pathlib import Path


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon, without pages of mapped files; 0 when the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)

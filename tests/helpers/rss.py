"""The anonymous memory of a process."""

from pathlib import Path


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon in bytes, which excludes pages of mapped files. 0 if the process has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)

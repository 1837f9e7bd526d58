"""`Report`, the findings of the checks of a checkpoint folder."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Report:
    """The findings, a line each.

    problems: reasons not to use the checkpoint.
    notes: harmless findings.
    checked: what was checked.
    bad_files: the files that have a problem, so that later checks can skip them.
    digests: shard's file name -> one checksum over the CRCs of its tensors, or, if the format has no CRCs, its size and
        the CRC of its first MiB. Hosts compare these.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    bad_files: set[Path] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)

    def add_problem(self, path: Path, problem: str) -> None:
        self.problems.append(f"{path} {problem}")
        self.bad_files.add(path)

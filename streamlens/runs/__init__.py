"""The run store: one SQLite file with every frame of one or more runs, written and read back."""

from streamlens.runs.catalogue import RunRecord, list_runs
from streamlens.runs.reader import Run, read_run
from streamlens.runs.removal import remove_run
from streamlens.runs.writer import RunWriter

__all__ = ["Run", "RunRecord", "RunWriter", "list_runs", "read_run", "remove_run"]

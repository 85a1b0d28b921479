"""A table in W&B that grows with the run."""

from collections.abc import Sequence
from typing import Any, final

import wandb

#: W&B shows the last 100 increments of a table, so rows wait until they are this share of those that are there.
WORTH = 0.1


@final
class GrowingTable:
    """Rows that go to W&B in increments: each row once, and fewer than 100 increments for 50 000 looks.

    A row waits until a tenth as many are new as are there already; `rest` gives what still waits.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._table = wandb.Table(columns=list(columns), log_mode="INCREMENTAL")
        self._waiting: list[list[Any]] = []

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        self._waiting += [list(row) for row in rows]

    @property
    def is_due(self) -> bool:
        return len(self._waiting) > WORTH * len(self._table.data)

    @property
    def has_rest(self) -> bool:
        return bool(self._waiting)

    def rest(self) -> wandb.Table:
        """The table with the rows that wait, to be logged at once. Those logged before are not sent again."""
        # They are not needed any more, only counted; or a long run would hold the text of all its looks.
        self._table.data[:] = [[]] * len(self._table.data)
        for row in self._waiting:
            self._table.add_data(*row)
        self._waiting = []
        return self._table

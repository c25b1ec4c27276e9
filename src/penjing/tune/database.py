"""Finished trials in a database of the user's own, as a study of Optuna.

Every trial is added finished, in one transaction; other tools see its values, constraints and
state, and what else a record has as the attribute `record`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from penjing.errors import InputError
from penjing.tune.propose import frozen
from penjing.tune.records import Record, check_same, in_turn
from penjing.tune.space import Space

__all__ = ["Database", "lock_of", "safe_url"]

_SEARCH, _RECORD = "search", "record"


def safe_url(url: str) -> str:
    """Without the user's name and password."""
    return re.sub(r"//[^/@]*@", "//...@", url)


def lock_of(url: str, name: str) -> Path:
    """The lock file of a study, of all processes of this machine that name it alike."""
    cache = Path(os.environ.get("PENJING_CACHE", Path.home() / ".cache" / "penjing"))
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"tune-{hashlib.sha256(f'{url} {name}'.encode()).hexdigest()[:24]}.lock"


class Database:
    """Records in a study of Optuna's.

    Args:
        url: as SQLAlchemy takes it, e.g. `sqlite:///trials.db`.
        name: of the study.
        search: what the search is, JSON-ready; a study of another one is refused.
        space: the search space.
        objectives: numbers that an outcome has.
        concurrency: of the search.

    Raises:
        InputError: the database cannot be opened, or its study is not of this search.
    """

    def __init__(
        self, url: str, name: str, search: dict[str, Any], space: Space, objectives: int,
        concurrency: int = 1,
    ) -> None:  # fmt: skip
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._objectives, self._place = space, objectives, safe_url(url)
        search = json.loads(json.dumps(search))
        try:
            self._study = optuna.create_study(
                storage=url, study_name=name, directions=["minimize"] * objectives,
                load_if_exists=True,
            )  # fmt: skip
            kept, trials = self._study.user_attrs.get(_SEARCH), self._study.get_trials()
        except Exception as error:  # drivers raise kinds of their own
            reason = str(error).replace(url, self._place).splitlines()
            raise InputError(
                f"cannot open the storage {self._place}",
                got=f"{type(error).__name__}: {reason[0] if reason else ''}",
                allowed="a URL that Optuna takes, e.g. sqlite:///trials.db",
                next="check the URL, and that the database's driver is installed",
            ) from error
        where = f"the study {name} in {self._place}"
        if kept is None and not trials:
            self._study.set_user_attr(_SEARCH, search)
        else:
            check_same(kept or {}, search, where)
        try:
            self.records = [Record.of_json(t.user_attrs[_RECORD]) for t in trials]
            if not in_turn([r.number for r in self.records], concurrency):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{where} has trials that penjing tune did not make", next="choose another storage"
            ) from error

    def append(self, record: Record) -> None:
        """Add a finished trial.

        Raises:
            InputError: it cannot be written, or another process writes to the study.
        """
        trial = frozen(self._space, record, self._objectives, {_RECORD: record.to_json()})
        try:
            self._study.add_trial(trial)
            there = len(self._study.get_trials(deepcopy=False))
        except Exception as error:  # drivers raise kinds of their own
            raise InputError(
                f"cannot write to the storage {self._place}", got=type(error).__name__,
                next="run again: finished trials are kept",
            ) from error  # fmt: skip
        self.records.append(record)
        if there != len(self.records):
            raise InputError(
                f"another process writes to the study in {self._place}",
                got=f"{there} trials", allowed=len(self.records),
                next="let one process search, and begin anew in another study",
            )  # fmt: skip

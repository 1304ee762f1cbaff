"""The measured table: seconds per step on this GPU, model and server configuration.

    profile = Profile.from_samples(samples, fingerprint)    # or Profile.from_csv(path), Profile.load(path, fingerprint)
    costs = profile.costs(batch=16, context_tokens=2048)
    costs.step_s[PLAIN]                                      # a plain decode step
    costs.step_s[Rung(3)]                                    # a cycle of gamma 3: three drafted tokens and one verify
    costs.step_s[Rung(3, window=256)]                        # ... whose drafts attend to the last 256 tokens

A plain decode step is a verify of gamma 0, so one family of tables `forward_s[gamma]` holds T_target (gamma 0) and
T_verify, and `draft_s[window]` holds T_draft, the time of one drafted token. Tables are indexed [batch][context] over
shared axes.
"""

from __future__ import annotations

import csv
import json
import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import median
from typing import NamedTuple

from er_sglang.policy.tables import ProfileError, Table, blend, complete, isotonic, locate

FORMAT = 2
CSV_COLUMNS = ("phase", "gamma", "batch", "context_tokens", "seconds")  # and window, if not 0 throughout
PHASES = ("target", "draft", "verify")
REPAIR_REPORTED = 0.05  # a cell that the monotone repair moves further than this is reported as an outlier


class Rung(NamedTuple):
    """A way to take a step: gamma drafted tokens, each reading `window` tokens of a context (0: all)."""

    gamma: int
    window: int = 0


PLAIN = Rung(0)


def widest_first(windows: Iterable[int]) -> list[int]:
    """Attention windows by how much they see."""
    return sorted(windows, key=lambda window: -window if window else -inf)


class Sample(NamedTuple):
    """One measurement. phase 'target' has gamma 0; 'draft' is the time of one drafted token, whatever its gamma, with
    an attention window or (0) without."""

    phase: str
    gamma: int
    batch: int
    context_tokens: int
    seconds: float
    window: int = 0


class Costs(NamedTuple):
    """Seconds per step at one (batch, context), by rung; `outside` says that no measured cell surrounds the point."""

    step_s: dict[Rung, float]
    outside: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The tables and where they come from.

    unavailable: (batch, context) at which something could not be measured (memory forbids it, say) and is extrapolated.
    outliers: what the monotone repair moved, in words.
    fingerprint: everything that the times depend on.
    """

    batches: tuple[int, ...]
    contexts_tokens: tuple[int, ...]
    forward_s: Mapping[int, Table]
    draft_s: Mapping[int, Table]
    unavailable: frozenset[tuple[int, int]] = frozenset()
    outliers: tuple[str, ...] = ()
    fingerprint: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, axis in (("batches", self.batches), ("contexts_tokens", self.contexts_tokens)):
            if not axis or axis[0] < 1 or any(low >= high for low, high in zip(axis, axis[1:])):
                raise ProfileError(f"{name} must be positive and strictly increasing, got {axis}")
        if 0 not in self.forward_s:
            raise ProfileError("the table has no plain decode step (gamma 0): every decision is relative to it")
        if not self.draft_s:
            raise ProfileError("the table has no drafted token")
        for table in (*self.draft_s.values(), *self.forward_s.values()):
            if len(table) != len(self.batches) or any(len(row) != len(self.contexts_tokens) for row in table):
                raise ProfileError(f"every table must have {len(self.batches)} x {len(self.contexts_tokens)} cells")
            if not all(0.0 < cell < inf for row in table for cell in row):
                raise ProfileError("every cell must be a positive, finite number of seconds")

    @property
    def gammas(self) -> tuple[int, ...]:
        """The draft lengths measured, without 0."""
        return tuple(gamma for gamma in sorted(self.forward_s) if gamma)

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention windows measured, 0 for none."""
        return tuple(sorted(self.draft_s))

    def costs(self, batch: float, context_tokens: float) -> Costs:
        """Seconds per step for every rung, bilinear in batch and mean context, linear beyond the last cells."""
        i, u = locate(self.batches, batch)
        j, v = locate(self.contexts_tokens, context_tokens)
        forward_s = {gamma: blend(table, i, u, j, v) for gamma, table in self.forward_s.items()}
        step_s = {PLAIN: forward_s.pop(0)}
        for window in self.draft_s:
            draft_s = self.drafted_token_s(batch, context_tokens, window)
            for gamma, verify_s in forward_s.items():
                step_s[Rung(gamma, window)] = gamma * draft_s + verify_s
        return Costs(step_s, self._is_outside(batch, context_tokens, i, u, j, v))

    def target_s(self, batch: float, context_tokens: float) -> float:
        return self.verify_s(batch, context_tokens, 0)

    def verify_s(self, batch: float, context_tokens: float, gamma: int) -> float:
        return self._at(self.forward_s[gamma], batch, context_tokens)

    def drafted_token_s(self, batch: float, context_tokens: float, window: int = 0) -> float:
        """A draft that sees all of its window takes as long in every context: as in the first measured one that is longer,
        and in a shorter one no longer than without a window."""
        longer = [context for context in self.contexts_tokens if context > window]
        if not window or not longer:
            return self._at(self.draft_s[window], batch, context_tokens)
        if 0 not in self.draft_s:
            return self._at(self.draft_s[window], batch, min(context_tokens, longer[-1]))
        within_s = self._at(self.draft_s[0], batch, context_tokens)
        return min(within_s, self._at(self.draft_s[window], batch, min(max(context_tokens, longer[0]), longer[-1])))

    def step_s(self, batch: float, context_tokens: float, rung: Rung) -> float:
        """As ``costs`` has it, of one rung."""
        verify_s = self.verify_s(batch, context_tokens, rung.gamma)
        if not rung.gamma:
            return verify_s
        return rung.gamma * self.drafted_token_s(batch, context_tokens, rung.window) + verify_s

    def with_attention_window(self, window: int, sink_tokens: int) -> Profile:
        """With a table for ``window``, by that of full attention: a draft that sees that many tokens, and the
        context's first ``sink_tokens``, takes as long in any longer context as in one of just these."""
        seen = window + sink_tokens
        table = [[self.drafted_token_s(b, min(c, seen)) for c in self.contexts_tokens] for b in self.batches]
        return replace(self, draft_s={**self.draft_s, window: _as_table(table)})

    def _at(self, table: Table, batch: float, context_tokens: float) -> float:
        return blend(table, *locate(self.batches, batch), *locate(self.contexts_tokens, context_tokens))

    def _is_outside(self, batch: float, context_tokens: float, i: int, u: float, j: int, v: float) -> bool:
        batches, contexts = self.batches, self.contexts_tokens
        if not (batches[0] <= batch <= batches[-1] and contexts[0] <= context_tokens <= contexts[-1]):
            return True
        if not self.unavailable:
            return False
        rows = (i, i + 1) if u else (i,)
        columns = (j, j + 1) if v else (j,)
        return any(
            (self.batches[row], self.contexts_tokens[column]) in self.unavailable for row in rows for column in columns
        )

    @classmethod
    def from_samples(cls, samples: Iterable[Sample], fingerprint: Mapping[str, object] | None = None) -> Profile:
        """Median per cell, isotonic in batch and context; what was not measured is extrapolated and marked unavailable.

        Raises ProfileError if a phase is missing or a context has fewer than two batch sizes to extrapolate from.
        """
        # By phase and what tells its tables apart: the window of a draft, the gamma of a forward.
        seconds: dict[tuple[str, int], dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
        for sample in samples:
            draft = sample.phase == "draft"
            if sample.phase not in PHASES or not draft and (sample.gamma > 0) != (sample.phase == "verify"):
                raise ProfileError(
                    f"{sample}: phase must be one of {', '.join(PHASES)}; gamma is 0 for target and positive for verify"
                )
            key = sample.window if draft else sample.gamma
            if not 0.0 < sample.seconds < inf:
                raise ProfileError(f"{sample}: it must be a positive, finite number of seconds")
            seconds[sample.phase, key][sample.batch, sample.context_tokens].append(sample.seconds)
        missing = [phase for phase in PHASES if not any(phase == key[0] for key in seconds)]
        if missing:
            raise ProfileError(f"no measurement of phase {', '.join(missing)}")
        every = {cell for cells in seconds.values() for cell in cells}
        measured = set.intersection(*(set(cells) for cells in seconds.values()))
        batches = tuple(sorted({batch for batch, _ in every}))
        contexts = tuple(sorted({context for _, context in every}))
        unavailable = frozenset((b, c) for b in batches for c in contexts if (b, c) not in measured)
        tables, outliers = {}, []
        for (phase, key), cells in seconds.items():
            medians = {cell: median(values) for cell, values in cells.items()}
            repaired = isotonic(medians)
            outliers += [
                f"{phase} {'window' if phase == 'draft' else 'gamma'} {key} at batch {b}, context {c}: "
                f"measured {medians[b, c]:.3e} s, used {repaired[b, c]:.3e} s"
                for b, c in sorted(medians)
                if abs(repaired[b, c] - medians[b, c]) > REPAIR_REPORTED * medians[b, c]
            ]
            tables[phase, key] = complete(repaired, batches, contexts)
        return cls(
            batches=batches,
            contexts_tokens=contexts,
            forward_s={gamma: table for (phase, gamma), table in sorted(tables.items()) if phase != "draft"},
            draft_s={window: table for (phase, window), table in sorted(tables.items()) if phase == "draft"},
            unavailable=unavailable,
            outliers=tuple(outliers),
            fingerprint=dict(fingerprint or {}),
        )

    @classmethod
    def from_csv(cls, path: str | Path) -> Profile:
        """Columns: phase (target, draft, verify), gamma, batch, context_tokens, seconds, and window if there is any but
        0; repeated cells are samples."""
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            missing = set(CSV_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise ProfileError(
                    f"{path} lacks the columns {', '.join(sorted(missing))}; expected {','.join(CSV_COLUMNS)}"
                )
            try:
                rows = [
                    Sample(
                        row["phase"],
                        *(int(row[key]) for key in CSV_COLUMNS[1:4]),
                        float(row["seconds"]),
                        int(row.get("window") or 0),
                    )
                    for row in reader
                ]
            except ValueError as error:
                raise ProfileError(f"{path}, line {reader.line_num}: {error}") from error
        return cls.from_samples(rows)

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """JSON or, by its suffix, CSV; wherever it was measured."""
        return cls.from_csv(path) if Path(path).suffix == ".csv" else cls.load(path)

    def save(self, path: str | Path) -> None:
        """Write JSON in one atomic replacement: replicas, on many hosts even, may share the cache."""
        content = {
            "format": FORMAT,
            "fingerprint": dict(self.fingerprint),
            "batches": self.batches,
            "contexts_tokens": self.contexts_tokens,
            "forward_s": {str(gamma): table for gamma, table in self.forward_s.items()},
            "draft_s": {str(window): table for window, table in self.draft_s.items()},
            "unavailable": sorted(self.unavailable),
            "outliers": self.outliers,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path, expected: Mapping[str, object] | None = None) -> Profile:
        """Read JSON. With `expected`, raise ProfileError unless it equals the fingerprint, naming what differs.

        Raises ProfileError for whatever does not hold a profile, too, and OSError for a file that cannot be read.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            if content["format"] != FORMAT:
                raise ProfileError(f"it has format {content['format']}, this version reads {FORMAT}")
            profile = cls(
                batches=tuple(content["batches"]),
                contexts_tokens=tuple(content["contexts_tokens"]),
                forward_s={int(gamma): _as_table(table) for gamma, table in content["forward_s"].items()},
                draft_s={int(window): _as_table(table) for window, table in content["draft_s"].items()},
                unavailable=frozenset((b, c) for b, c in content["unavailable"]),
                outliers=tuple(content["outliers"]),
                fingerprint=dict(content["fingerprint"]),
            )
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path} is not JSON ({error}): calibrate again") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # JSON of any other shape
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ProfileError(f"{path} is no profile that can be used ({reason}): calibrate again") from error
        if expected is not None:
            found = profile.fingerprint
            expected = json.loads(json.dumps(dict(expected)))  # as JSON would give it back: tuples are lists there
            differing = [key for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]
            if differing:
                details = "; ".join(
                    f"{key}: profile {found.get(key)!r}, here {expected.get(key)!r}" for key in differing
                )
                raise ProfileError(
                    f"{path} was measured elsewhere ({details}): run `er-sglang calibrate` for this configuration"
                )
        return profile


def _as_table(rows: Sequence[Sequence[float]]) -> Table:
    return tuple(tuple(row) for row in rows)

"""Evaluations in, what the run has learnt so far out: said in the log, and warned of in the run's ledger."""

import json
from pathlib import Path
from typing import Any

from data.diagnosis import Finding, judge_source
from data.inspection import byte_ids, survey_sources
from data.objectives import TASKS
from data.shards import Dataset
from trainer.config import RunConfig
from trainer.evaluation import HeldOut
from trainer.learning_warnings import Evidence, Warning, warnings_of
from trainer.ledger import Ledger
from trainer.state import TrainState
from trainer.stretch import Stretch
from trainer.thermometer import Line, reference_band, tokens_of_task

UNEXPLAINED = (
    ". A sample of the text shows nothing unusual: try a third of the learning rate, and three times as much. "
    "Labels that do not follow from the text look like this, too"
)
SURVEYED_TOKENS = 1 << 20  # of training text: a second of reading


class Learning:
    """Of one job, on its main rank; the others judge nothing. metrics.jsonl has the evaluations before it."""

    def __init__(
        self, run: RunConfig, dataset: Dataset, ledger: Ledger, state: TrainState, *, is_main: bool
    ) -> None:
        self._is_main = is_main
        self._run, self._dataset, self._ledger = run, dataset, ledger
        self._findings: list[Finding] | None = None
        self._quiet_until: dict[tuple[str, str], int] = {}  # step, of each warning and task
        self.begin(state)

    def begin(self, state: TrainState) -> None:
        """Go on from `state`: evaluations of later steps come again."""
        path = Path(self._run.dir) / "metrics.jsonl"
        if not self._is_main:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if '"heldout"' in line]
        self._history = [line for line in found if line["step"] <= state.step]

    def look_at_text(self, state: TrainState) -> None:
        """Before the first step: what is so wrong with the text that little can be learnt of it."""
        if self._is_main and state.step == 0:
            for found in self._text():
                if found.verdict == "PROBLEM":
                    said = f"{found.check} of {found.of}: {found.found}. {found.advice}"
                    self._ledger.event("text", state.step, said)

    def judge(
        self, state: TrainState, stretch: Stretch, heldout: HeldOut, train: Line
    ) -> dict[str, Any]:
        """The evaluation as a line of metrics.jsonl; what is wrong with the curve becomes an event.

        train: what was logged of training last.
        """
        line = {"step": state.step, "num_tokens": state.num_tokens, **heldout.as_json()}
        line["reference"] = self._reference(line, stretch, state)
        losses = {f"{task}_loss" for task in TASKS}
        line["train"] = {name: value for name, value in train.items() if name in losses}
        self._history.append(line)
        for warning in warnings_of(
            self._history,
            Evidence(self._dataset.manifest, train),
            warmup_steps=self._run.optim.warmup_steps,
            stuck_after_steps=self._run.stuck_after_steps,
        ):
            key = (warning.kind, warning.task)
            if state.step >= self._quiet_until.get(key, 0):
                self._quiet_until[key] = 2 * state.step
                said = f"{warning.task}: {warning.message}{self._of_text(warning)}"
                self._ledger.event("learning", state.step, said)
        return line

    def _reference(self, line: Line, stretch: Stretch, state: TrainState) -> dict[str, Any]:
        """Task -> lowest and highest loss of our own runs after as much text, in nats."""
        mixture, found = stretch.settings.data.mixture, {}
        for task, lines in line["guessing"].items():
            guess = next(iter(lines.values()))
            num_tokens = tokens_of_task(task, mixture, state.num_tokens)
            if band := reference_band(task, num_tokens, guess.loss_nats):
                found[task] = list(band)
        return found

    def _of_text(self, warning: Warning) -> str:
        """What is unusual about the text, which may explain it; or what to try."""
        unusual = [found for found in self._text() if found.verdict != "OK"]
        if unusual and warning.kind != "lost":
            said = "; ".join(f"{found.check} of {found.of}: {found.found}" for found in unusual)
            return f". Of the text: {said}. {unusual[0].advice}"
        return "" if warning.is_explained else UNEXPLAINED

    def _text(self) -> list[Finding]:
        """A sample, surveyed once."""
        if self._findings is None:
            unknown_id = self._dataset.special_ids["[UNK]"]
            bytes_of_text = byte_ids(self._dataset.root / "tokenizer")
            self._findings = [
                finding
                for survey in survey_sources(self._dataset, SURVEYED_TOKENS)
                for finding in judge_source(survey, unknown_id, bytes_of_text)
            ]
        return self._findings

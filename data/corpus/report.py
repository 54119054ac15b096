"""The counts of all tasks in, one report out: as JSON, as Markdown, and as a page that needs no network."""

from html import escape
from pathlib import Path
from typing import Any

from data.corpus.output import WORK, counts_path
from data.corpus.plots import bars
from data.corpus.stages import COPIES, CorpusStep, CorpusTask, Documents, load_tally
from data.corpus.tally import Example, Tally
from data.files import publishing, read_json, write_json

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6b7b; --line: #d8dee6; --bar: #3b7dd8; --page: #fff; --card: #f5f7fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #98a6b5; --line: #36424e; --bar: #6aa3ee; --page: #12181f; --card: #1b232c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p.lead { color: var(--soft); margin-top: 0 } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right } svg { display: block; width: 100%; max-width: 46rem; font-size: 12px } svg text { fill: var(--ink) } svg .value { fill: var(--soft) }
svg rect { fill: var(--bar) } details { background: var(--card); border-radius: 6px; padding: .5rem .8rem; margin: .5rem 0 } summary { cursor: pointer }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere }
small { color: var(--soft) } ins { text-decoration: none; border-left-color: var(--bar) }
"""  # noqa: E501


class Report(CorpusStep):
    """The last stage: a single task that adds up what all others have counted."""

    name, type = "report", "report"

    def __init__(self, output: Path, recipe: dict[str, Any], tasks: list[CorpusTask]) -> None:
        super().__init__()
        self.output, self.recipe, self.tasks = output, recipe, tasks

    def work(self, data: Documents, rank: int) -> Documents:
        report = gather(self.output, self.recipe, self.tasks)
        write_json(self.output / "report.json", report)
        for name, text in (("report.md", markdown(report)), ("report.html", page(report))):
            with publishing(self.output / name) as file:
                file.write(text.encode("utf-8", "backslashreplace"))
        yield from ()


def gather(output: Path, recipe: dict[str, Any], tasks: list[CorpusTask]) -> dict[str, Any]:
    """All figures of a run: per source, and over all."""
    steps = ["read", *(_name(step) for step in recipe.get("steps") or []), COPIES]
    whole = Tally()
    sources: dict[str, Tally] = {}
    for number, task in enumerate(tasks):
        for stage in ("clean", "publish"):
            tally = load_tally(counts_path(output, stage, number))
            sources.setdefault(task.source, Tally()).add(tally)
            whole.add(tally)
    clusters = output / WORK / "clusters.json"
    return {
        "sources": {name: _figures(tally, steps) for name, tally in sources.items()},
        "total": _figures(whole, steps),
        "languages": dict(whole.languages.most_common()),
        "lengths": dict(sorted(whole.lengths.items(), key=lambda item: int(item[0]))),
        "truth": _truth(whole, recipe.get("truth") or {}),
        "labels": {label: dict(counts.most_common()) for label, counts in whole.labels.items()},
        "examples": {kind: [e._asdict() for e in found] for kind, found in whole.examples.items()},
        "clusters": read_json(clusters) if clusters.exists() else None,
    }


def _truth(tally: Tally, truth: dict[str, str]) -> dict[str, dict[str, float | int]]:
    """Step -> precision and recall by the labels. A document is found if the step dropped or changed it.

    Recall: of those with a label of the step, found by it or dropped by another. Precision: of those
    with any label that the step found, those with a label of its own. "a:b" counts as "a", too.
    """
    found: dict[str, dict[str, float | int]] = {}
    for step in dict.fromkeys(truth.values()):
        wanted = caught = right = touched = 0
        for label, outcomes in tally.labels.items():
            mine = truth.get(label, truth.get(label.partition(":")[0])) == step
            for outcome, n in outcomes.items():
                _, _, by = outcome.partition(" by ")
                hit = step in by.partition(":")[0].split("+")
                wanted += n if mine else 0
                caught += n if mine and (hit or outcome.startswith("dropped")) else 0
                touched += n if hit else 0
                right += n if hit and mine else 0
        found[step] = {
            "documents": wanted,
            "recall": caught / max(1, wanted),
            "precision": right / max(1, touched),
        }
    return found


def _name(step: Any) -> str:
    return next(iter(step)) if isinstance(step, dict) else step


def _figures(tally: Tally, steps: list[str]) -> dict[str, Any]:
    counts = tally.counts
    rows = []
    for step in steps:
        dropped = _under(counts, f"{step}/dropped/")
        documents = counts[f"{step}/documents"]
        if step == COPIES:
            documents = counts["kept/documents"] + sum(dropped.values())
        rows.append(
            {
                "step": step,
                "documents": documents,
                "changed_documents": counts[f"{step}/changed_documents"],
                "changes": _under(counts, f"{step}/changed/"),
                "dropped": dropped,
                "dropped_bytes": counts[f"{step}/dropped_bytes"],
            }
        )
    names = ("read/documents", "read/bytes", "kept/documents", "kept/bytes")
    return {name.replace("/", "_"): counts[name] for name in names} | {"steps": rows}


def _under(counts: Any, prefix: str) -> dict[str, int]:
    found = {k.removeprefix(prefix): n for k, n in counts.items() if k.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def markdown(report: dict[str, Any]) -> str:
    """The report's tables, for a terminal or a repository."""
    lines = ["# Corpus report", "", *_table(SOURCE_HEAD, _source_rows(report))]
    lines += ["", "## Steps", "", *_table(STEP_HEAD, _step_rows(report["total"]))]
    lines += ["", "## Languages of what stays", ""]
    lines += [f"- {name}: {n:,} characters" for name, n in report["languages"].items()]
    if report["labels"]:
        lines += [
            "",
            "## Labels and what became of them",
            "",
            *_table(LABEL_HEAD, _label_rows(report)),
        ]
    if report["truth"]:
        lines += ["", "## Precision and recall", "", *_table(TRUTH_HEAD, _truth_rows(report))]
    if report["clusters"]:
        lines += ["", "## Largest clusters of copies", ""]
        lines += [f"- {name}: {n} copies" for name, n in report["clusters"]["largest"]]
    return "\n".join(lines) + "\n"


SOURCE_HEAD = ["source", "documents read", "kept", "", "MB read", "MB kept", ""]
STEP_HEAD = ["step", "documents", "changed", "dropped", "why"]
TRUTH_HEAD = ["step", "documents with its labels", "recall", "precision"]
LABEL_HEAD = ["label", "documents", "outcome"]


def _source_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, f in [*report["sources"].items(), ("all", report["total"])]:
        read, kept = f["read_documents"], f["kept_documents"]
        share = f["kept_bytes"] / max(1, f["read_bytes"])
        rows.append(
            [
                name, f"{read:,}", f"{kept:,}", f"{kept / max(1, read):.1%}",
                f"{f['read_bytes'] / 1e6:,.1f}", f"{f['kept_bytes'] / 1e6:,.1f}", f"{share:.1%}",
            ]
        )  # fmt: skip
    return rows


def _step_rows(figures: dict[str, Any]) -> list[list[str]]:
    rows = []
    for step in figures["steps"]:
        documents = step["documents"] or figures["read_documents"]
        dropped = sum(step["dropped"].values())
        why = [f"{reason} {n:,}" for reason, n in step["dropped"].items()]
        if step["changes"]:
            changes = (f"{kind} {n:,}" for kind, n in step["changes"].items())
            why.append(f"changed: {', '.join(changes)}")
        row = [step["step"], f"{documents:,}", f"{step['changed_documents']:,}", f"{dropped:,}"]
        rows.append([*row, "; ".join(why)])
    return rows


def _truth_rows(report: dict[str, Any]) -> list[list[str]]:
    return [
        [step, f"{f['documents']:,}", f"{f['recall']:.1%}", f"{f['precision']:.1%}"]
        for step, f in report["truth"].items()
    ]


def _label_rows(report: dict[str, Any]) -> list[list[str]]:
    return [
        [label, f"{sum(outcomes.values()):,}", "; ".join(f"{o} {n}" for o, n in outcomes.items())]
        for label, outcomes in sorted(report["labels"].items())
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


def page(report: dict[str, Any]) -> str:
    """The same as HTML, with plots, and examples of what was dropped and changed."""
    total = report["total"]
    read, kept = total["read_documents"], total["kept_documents"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Corpus report</title><style>{STYLE}</style><h1>Corpus report</h1>",
        f"<p class=lead>{kept:,} of {read:,} documents stay ({kept / max(1, read):.1%}), "
        f"{total['kept_bytes'] / 1e6:,.1f} of {total['read_bytes'] / 1e6:,.1f} MB.</p>",
        _html_table(SOURCE_HEAD, _source_rows(report), numbers=range(1, 7)),
        "<h2>Steps</h2>", _html_table(STEP_HEAD, _step_rows(total), numbers=range(1, 4)),
        "<h2>Why documents were dropped</h2>", _dropped_plot(total),
        "<h2>Lengths of what stays</h2>", _length_plot(report["lengths"]),
        "<h2>Languages of what stays</h2>", _language_plot(report["languages"]),
    ]  # fmt: skip
    if report["labels"]:
        parts.append("<h2>Labels and what became of them</h2>")
        parts.append(_html_table(LABEL_HEAD, _label_rows(report), numbers=range(1, 2)))
    if report["truth"]:
        parts.append("<h2>Precision and recall by the labels</h2>")
        parts.append(_html_table(TRUTH_HEAD, _truth_rows(report), numbers=range(1, 4)))
    if report["clusters"]:
        rows = [[name, f"{n:,}"] for name, n in report["clusters"]["largest"]]
        parts += [
            "<h2>Largest clusters of copies</h2>",
            _html_table(["what stays", "copies"], rows, range(1, 2)),
        ]
    parts += ["<h2>Examples</h2>", *_examples(report["examples"])]
    return "\n".join(parts) + "\n"


def _html_table(head: list[str], rows: list[list[str]], numbers: range) -> str:
    def row(cells: list[str], tag: str) -> str:
        marks = (" class=n" if i in numbers else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}" for c, m in zip(cells, marks, strict=True))

    body = "".join(row(cells, "td") for cells in rows)
    return f"<div class=wide><table>{row(head, 'th')}{body}</table></div>"


def _dropped_plot(total: dict[str, Any]) -> str:
    reasons = [
        (f"{step['step']}: {reason}", n)
        for step in total["steps"]
        for reason, n in step["dropped"].items()
    ]
    reasons.sort(key=lambda item: -item[1])
    if not reasons:
        return "<p>None was.</p>"
    shown = [(name, float(n), f"{n:,}") for name, n in reasons[:20]]
    return bars(shown, "documents dropped by reason")


def _length_plot(lengths: dict[str, int]) -> str:
    shown = [(f"under {2 ** int(bits):,}", float(n), f"{n:,}") for bits, n in lengths.items()]
    return (
        bars(shown, "documents by number of characters") + "<small>characters of a document</small>"
    )


def _language_plot(languages: dict[str, int]) -> str:
    whole = sum(languages.values()) or 1
    shown = [(name, float(n), f"{n / whole:.1%}") for name, n in list(languages.items())[:20]]
    return bars(shown, "characters by language") + "<small>share of characters</small>"


def _examples(examples: dict[str, list[dict[str, Any]]]) -> list[str]:
    parts = []
    for kind, found in sorted(examples.items()):
        parts.append(f"<details><summary>{escape(kind.replace('/', ': '))}</summary>")
        parts += [_example(Example(**example)) for example in found]
        parts.append("</details>")
    return parts


def _example(example: Example) -> str:
    after = f"<blockquote class=after>{escape(example.after)}</blockquote>" if example.after else ""
    return (
        f"<h3>{escape(example.id)} <small>{escape(example.detail)}</small></h3>"
        f"<blockquote>{escape(example.before) or '<small>no text</small>'}</blockquote>{after}"
    )

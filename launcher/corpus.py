"""`cloze corpus RECIPE`: raw text of any quality in, clean documents and a report out."""

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file, e.g. configs/corpus.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. executor.workers=8")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with the Slurm executor: write its scripts, submit nothing",
    )
    parser.add_argument("--verbose", action="store_true", help="datatrove's log on the screen, too")


def run(options: argparse.Namespace) -> int:
    """Carry the recipe out, or go on with it. ValueError and OSError say what is wrong."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # datatrove's file layer would look for a login
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from data.corpus.recipe import load_recipe
        from data.corpus.run import run_recipe
    except ImportError as error:
        raise ValueError(f"cloze corpus needs {error.name}: pip install 'cloze[corpus]'") from error
    recipe = load_recipe(options.recipe, options.overrides)
    report = run_recipe(recipe, dry_run=options.dry_run, verbose=options.verbose)
    if report is None:
        where = Path(recipe.output, ".work", "logs").absolute()
        print(
            f"{'written' if options.dry_run else 'submitted'}: the stages' Slurm scripts under {where}"
        )
        return 0
    print(report.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"report: {report}\ndocuments: {report.parent / 'documents'}", file=sys.stderr)
    return 0

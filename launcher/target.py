"""A dataset's place or a preset's path in, the dataset and the numbers of the planned run out."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from data.lanes import DataConfig
from data.layout import Layout
from data.transfer import is_url
from trainer.config import RunConfig, load_config
from trainer.phases import Settings, settings_at

DEFAULT_MICRO_BATCH = 8  # rows, where no preset says


@dataclass(frozen=True)
class Target:
    """What a run is planned to be. Without a preset, the numbers that were given, and defaults."""

    run: RunConfig | None  # None: a dataset alone
    settings: Settings  # of the first step
    num_ranks: int
    seed: int
    lanes_given: bool  # the number of lanes is somebody's wish, and no default

    @property
    def layout(self) -> Layout:
        return self.layout_of(self.settings, self.num_ranks)

    def layout_of(self, settings: Settings, num_ranks: int) -> Layout:
        data = settings.data
        return Layout(
            num_ranks,
            data.num_workers,
            settings.micro_batch_size,
            settings.global_batch_size,
            data.num_lanes,
        )

    @property
    def all_settings(self) -> list[tuple[int, Settings]]:
        """(first step, settings) of every phase of the preset."""
        if self.run is None:
            return [(0, self.settings)]
        later = [
            (phase.first_step, settings_at(self.run, phase.first_step)) for phase in self.run.phases
        ]
        workers = self.settings.data.num_workers
        return [
            (0, self.settings),
            *(
                (step, settings._replace(data=replace(settings.data, num_workers=workers)))
                for step, settings in later
            ),
        ]


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", help="of a preset: key=value, e.g. data.path=DATASET"
    )
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="training processes (default: %(default)s)")
    add("--workers", type=int, help="loader workers of a rank (default: the preset's, or 0)")
    told = "(default: the preset's; %s without one)"
    add("--sequence-length", type=int, help="row slots " + told % 128)
    add(
        "--num-lanes",
        type=int,
        help="lanes of the run " + told % "as many as fit ranks and workers",
    )
    add("--micro-batch", type=int, help="rows of a forward pass " + told % DEFAULT_MICRO_BATCH)
    add("--global-batch", type=int, help="rows of a step " + told % "as many as there are lanes")


def is_preset(target: str) -> bool:
    """Whether `target` names a preset's file, and no dataset."""
    return not is_url(target) and Path(target).suffix in (".yaml", ".yml")


def read_target(options: argparse.Namespace) -> Target:
    """The plan that the command line describes. ValueError naming what is wrong with it.

    options.target: the preset, or the dataset's folder or URL.
    """
    for name in ("ranks", "micro_batch", "global_batch", "sequence_length", "num_lanes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below 1")
    if is_preset(options.target):
        return _of_preset(options)
    if options.overrides:
        raise ValueError(
            f"{options.overrides} override a preset's values, and {options.target} is no .yaml file"
        )
    return _of_dataset(options)


def _of_preset(options: argparse.Namespace) -> Target:
    given = {
        "data.num_workers": options.workers,
        "data.sequence_length": options.sequence_length,
        "data.num_lanes": options.num_lanes,
        "micro_batch_size": options.micro_batch,
        "global_batch_size": options.global_batch,
    }
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    run = load_config(Path(options.target), [*options.overrides, *changes])
    return Target(run, settings_at(run, 0), options.ranks, run.seed, True)


def _of_dataset(options: argparse.Namespace) -> Target:
    workers = options.workers or 0
    micro_batch = options.micro_batch or DEFAULT_MICRO_BATCH
    lanes = options.num_lanes or DataConfig.num_lanes
    wanted = options.ranks * micro_batch * max(1, workers)
    if not options.num_lanes and wanted > lanes:  # so that each worker has lanes of its own
        lanes = 1 << (wanted - 1).bit_length()
    data = DataConfig(
        str(options.target),
        sequence_length=options.sequence_length or DataConfig.sequence_length,
        num_lanes=lanes,
        num_workers=workers,
    )
    slots = options.ranks * micro_batch
    batch = options.global_batch or max(lanes, 1 << (slots - 1).bit_length())
    settings = Settings(data, batch, micro_batch, {})
    return Target(None, settings, options.ranks, 1, options.num_lanes is not None)

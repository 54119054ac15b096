"""A real time limit: a job of two minutes is told to save by Slurm itself, and goes on with the same rows.

    python tests/cluster/time_limit.py --folder /scratch/time_limit

On the Slurm of the tests (root, Debian's packages). Slurm looks at limits every half minute, and sends a signal
up to a minute early, so this takes minutes: tests/test_slurm.py sends the same one by scancel instead. At the
end: every step once and in order; losses, gradient norms and digests of rows equal to those of one job.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from slurm_cluster import slurm_cluster  # noqa: E402
from support import launch, read_metrics, tiny_preset, write_corpus  # noqa: E402
from test_slurm import log_of, run_now, submit, wait_for_state  # noqa: E402
from test_trainer_stopping import curve, ledger  # noqa: E402

from data.prepare import PrepareConfig, prepare  # noqa: E402

LEAD_SECONDS = 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000, help="more than fit into two minutes")
    options = parser.parse_args()
    whole, cut = options.folder / "whole", options.folder / "cut"
    for folder in (whole, cut):
        folder.mkdir(parents=True)
    text = write_corpus(options.folder / "text.jsonl", 1500)
    dataset = prepare(
        PrepareConfig(
            output=str(options.folder / "dataset"), sources={"text": (str(text),)}, vocab_size=360,
            heldout_fraction=0.05, block_tokens=4096, num_processes=2,
        )
    )  # fmt: skip
    changes = {"steps": options.steps, "save_every": 0, "hang_timeout_seconds": 30}
    run = cut / "run"
    with slurm_cluster(2) as cluster:
        preset = tiny_preset(cut, dataset, **changes)
        began = time.monotonic()
        (job,) = submit(
            cluster, preset, "--hours=0.034", f"--signal-seconds={LEAD_SECONDS}"
        )  # 2 minutes
        wait_for_state(cluster, job, "RUNNING")
        wait_for_state(cluster, job, "PENDING")
        print(f"requeued {time.monotonic() - began:.0f} s after it was submitted", flush=True)
        while cluster.state(job) != "COMPLETED":
            run_now(cluster, job)
            wait_for_state(cluster, job, "RUNNING")
            wait_for_state(cluster, job, "PENDING", "COMPLETED")
        print(log_of(run))
    for line in ledger(run, "event"):
        print(f"step {line['step']}: {line['what']}: {line['message']}")
    ends = [line["status"] for line in ledger(run, "end")]
    assert len(ends) > 1 and ends[-1] == "done" and set(ends[:-1]) == {"preempted"}, ends
    assert [m["step"] for m in read_metrics(run)] == list(range(1, options.steps + 1))
    ended = launch(tiny_preset(whole, dataset, **changes), processes=2, timeout=3000)
    assert ended.returncode == 0, ended.stderr
    assert curve(run) == curve(whole / "run")
    print(
        f"{len(ends)} jobs ({', '.join(ends)}): {options.steps} steps, bit for bit those of one job"
    )


if __name__ == "__main__":
    main()

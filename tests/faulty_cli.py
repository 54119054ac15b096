"""`cloze train` whose training processes are tests/faulty_train.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]

from launcher import cli, supervise  # noqa: E402

launch_command = supervise.launch_command


def faulty(arguments: list[str], processes: int) -> list[str]:
    command = launch_command(arguments, processes)
    place = command.index("launcher.train") - 1
    return [*command[:place], str(ROOT / "tests" / "faulty_train.py"), *command[place + 2 :]]


supervise.launch_command = faulty
if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))

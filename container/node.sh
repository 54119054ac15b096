#!/bin/bash
# One machine's part of a run, under whatever starts it: the same command on every machine (docs/schedulers.md).
#
#   container/node.sh MACHINES PROCESSES FIRST_MACHINE:PORT PRESET [key=value ...]
#
# It hands signals on, so that all ranks save, and ends with the ranks' own status where torchrun would say 1:
# 75 stopped and saved, 74, 78 or 79 another start would not help, anything else: start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -f slurm/cluster.env ]; then
    set -a # what it sets is exported to every process of the run
    source slurm/cluster.env
    set +a
fi
[ ! -f "${CLOZE_VENV:-.venv}/bin/activate" ] || source "${CLOZE_VENV:-.venv}/bin/activate"
machines=$1 processes=$2 first=$3
shift 3
words=$(mktemp --directory) # a file for each rank: its pid, then its exit status
trap 'rm -rf "$words"' EXIT
torchrun=
asked=
hand_on() {
    asked=1
    [ -z "$torchrun" ] || kill -USR1 "$torchrun" 2>/dev/null || true
}
trap hand_on TERM INT USR1 USR2

CLOZE_STATUS_FILE=$words/rank torchrun \
    --nnodes="$machines" \
    --nproc-per-node="$processes" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first" \
    --rdzv-id=cloze \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2 \
    --shutdown-timeout=3600 \
    -m launcher.train "$@" &
torchrun=$!
[ -z "$asked" ] || hand_on # it came before there was anybody to hand it on to
while kill -0 "$torchrun" 2>/dev/null; do
    wait "$torchrun" || true # ends at every signal, too
done
wait "$torchrun" && status=0 || status=$?

for final in 79 78 74; do
    ! grep --quiet --line-regexp "$final" "$words"/rank-* 2>/dev/null || exit "$final"
done
others=$(grep --files-without-match --line-regexp 75 "$words"/rank-* 2>/dev/null || true)
[ "$status" = 0 ] || [ -n "$others" ] || [ -z "$(ls "$words")" ] || exit 75
exit "$status"

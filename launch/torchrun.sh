#!/usr/bin/env bash
# Trains on this node, as one of any number of nodes that each run the same line:
#
#   launch/torchrun.sh CONFIG [section.key=value ...]
#
# Ranks that crash, and nodes that are lost and come back, start again from the newest intact
# checkpoint. Set in the environment, if need be:
#
#   NNODES=1              nodes; MIN:MAX to go on with fewer when some are lost
#   RENDEZVOUS=HOST:PORT  where nodes meet, HOST being one of them; needed with several nodes
#   JOB=seqpar            a name that this job's nodes have in common
#   RANKS_PER_NODE=auto   a number; auto: one for each GPU, or for each core where there is none
#   MAX_RESTARTS=3        how often the ranks are started again
#   PYTHON=python         of the environment that seqpar is installed in
#
# SIGTERM or SIGUSR1 asks all ranks to save and leave. Exit codes: 0 trained to the end; 1 a mistake
# that starting again would repeat; 75 stopped as asked and saved; 76 crashed too often.
set -u

words=("$@")
[[ " $* " == *" checkpoint.resume="* || $# = 0 ]] || words+=(checkpoint.resume=auto)

# What the ranks agree to leave with: torchrun would tell only that something failed.
SEQPAR_EXIT_CODE_FILE=$(mktemp)
export SEQPAR_EXIT_CODE_FILE
trap 'rm -f "$SEQPAR_EXIT_CODE_FILE"' EXIT

# torchrun would keep one store for all starts, and not tell a node that comes later where it is.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun=("${PYTHON:-python}" -m torch.distributed.run)
options=(
  --nnodes "${NNODES:-1}"
  --nproc-per-node "${RANKS_PER_NODE:-auto}"
  --rdzv-backend c10d
  --rdzv-endpoint "${RENDEZVOUS:-localhost:0}"
  --rdzv-id "${JOB:-seqpar}"
  --max-restarts "${MAX_RESTARTS:-3}"
)
# torchrun gives ranks half a minute after a signal, which may be too short to save: where it can
# be told so, it leaves signals to this script.
if "${torchrun[@]}" --help 2>/dev/null | grep -q signals.to.handle; then
  options+=(--signals-to-handle SIGINT)
fi

(
  trap '' USR1 TERM
  exec "${torchrun[@]}" "${options[@]}" -m seqpar.launch.train ${words[@]+"${words[@]}"}
) &
agent=$!

# Ranks that are just starting do not listen yet, so they are asked until they leave.
ask_to_save() {
  while kill -0 "$agent"; do
    kill -USR1 $(cat "/proc/$agent/task/$agent/children")
    sleep 2
  done 2>/dev/null
}
trap 'ask_to_save &' USR1 TERM

wait "$agent"
code=$?
while kill -0 "$agent" 2>/dev/null; do # a signal ends `wait` early
  wait "$agent"
  code=$?
done

if [ -s "$SEQPAR_EXIT_CODE_FILE" ]; then
  exit "$(cat "$SEQPAR_EXIT_CODE_FILE")"
fi
[ "$code" = 0 ] || exit 76

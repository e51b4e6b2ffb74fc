#!/usr/bin/env bash
# Trains as a Slurm job, on every GPU of its nodes, from the folder that holds launch/:
#
#   sbatch --nodes 4 --time 12:00:00 launch/slurm.sh CONFIG [section.key=value ...]
#
# Five minutes before the time limit, and when it is preempted, the run saves and goes back into the
# queue; so it does after a node fails. It ends when it is trained, or at a mistake. What sbatch is
# given on the command line replaces what follows; torchrun.sh beside this file says what else can
# be set in the environment.
#SBATCH --job-name seqpar
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
#SBATCH --time 24:00:00
#SBATCH --signal B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output %x-%j.log
set -u

# Slurm runs a copy of this file, so its own folder says nothing.
launch=${SEQPAR_LAUNCH:-$SLURM_SUBMIT_DIR/launch}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_JOB_NUM_NODES
export JOB=seqpar-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export RENDEZVOUS=${RENDEZVOUS:-$first:$((29000 + SLURM_JOB_ID % 1000))}

echo "$(date -Is) start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID: $NNODES nodes"
srun --ntasks-per-node 1 bash "$launch/torchrun.sh" "$@" &
step=$!
trap 'echo "$(date -Is) asked to stop"; kill -USR1 "$step"' USR1 TERM

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` early
  wait "$step"
  code=$?
done

if [ "$code" = 75 ]; then
  echo "$(date -Is) saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || exit 75
  exit 0
fi
exit "$code"

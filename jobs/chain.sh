#!/bin/bash
# Submit a chain of jobs, each of which goes on where the one before has stopped.
#
#     jobs/chain.sh 5 train.py --checkpoints run-7
#
# For sites that do not let jobs requeue themselves. A job that is not finished exits with 75 and so counts as
# failed, and `afternotok` starts the next one; the job that finishes exits with 0, and the rest of the chain
# is removed, since it can never start. A node that fails, or a job that runs into its limit, costs a link.
# An error in the script costs all of them, one quickly after the other.

set -euo pipefail

links=${1:?usage: chain.sh NUMBER_OF_JOBS [SCRIPT ARGUMENTS...]}
shift
# sbatch's own options, such as --nodes=4, go into the environment: SBATCH_OPTIONS="--nodes=4 --time=02:00:00"
# The checkpoints must be in the same folder for all links, so it cannot be named after a job's number.
[[ $# -gt 0 ]] || set -- examples/train_digits.py --no-plot --checkpoints "checkpoints-chain-$(date +%s)"

previous=
for ((link = 1; link <= links; link++)); do
    previous=$(sbatch --parsable ${SBATCH_OPTIONS:-} ${previous:+--dependency=afternotok:$previous} \
        "$(dirname "${BASH_SOURCE[0]}")/chain.sbatch" "$@")
    previous=${previous%%;*} # a federation adds the cluster's name
    echo "$previous"
done

#!/usr/bin/env bash
# Both stages of Cola DLM on SLURM, each queued until the one before it has ended well: TextVAE, its export, DiT and
# TextVAE together, the export of both. From the repository, on 8 nodes:
#
#     NODES=8 launch/slurm/cola.sh [vae_500m dit_1800m] [options of sbatch ...]
#     launch/slurm/cola.sh vae_1gpu dit_1gpu --ntasks-per-node 1 --gpus-per-node 1
#     NODES=32 launch/slurm/cola.sh vae_500m dit_1800m --time 12:00:00 -- --training.micro_batch_rows 2
#
# The arguments name files of launch/configs/cola; behind -- stand options of both launchers. Every job asks for more
# time by itself (pretrain.sbatch).

set -euo pipefail
vae="${1:-vae_500m}"
dit="${2:-dit_1800m}"
shift "$(($# < 2 ? $# : 2))"
configs=launch/configs/cola
queue=() launcher=()
while (($#)) && [ "$1" != -- ]; do
    queue+=("$1")
    shift
done
(($#)) && launcher=("${@:2}")
python="${PYTHON:-.venv/bin/python}"

# train FILE LAUNCHER PREVIOUS_JOB: the number of the job
train() {
    sbatch --parsable ${3:+--dependency="afterok:$3"} --nodes "${NODES:-1}" "${queue[@]}" launch/slurm/pretrain.sbatch \
        "launch/$2" --config "$configs/$1.yaml" --deepspeed_config ds_configs/zero1.json "${launcher[@]}"
}

# model NAME PREVIOUS_JOB: the number of the job that exports the run of that name, in one task
model() {
    sbatch --parsable --dependency="afterok:$2" "${queue[@]}" --nodes 1 --ntasks 1 --ntasks-per-node 1 --job-name export \
        --wrap "$python launch/export.py --run runs/cola/$1 --output runs/cola/models/$1"
}

first="$(train "$vae" pretrain_vae.py "")"
exported="$(model "$vae" "$first")"
second="$(train "$dit" pretrain_cola.py "$exported")"
last="$(model "$dit" "$second")"
echo "queued: $first (stage 1), $exported (its export), $second (stage 2), $last (its export)"

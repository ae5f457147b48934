#!/usr/bin/env bash
# Train in routing mode: all four losses, three experts and their router.
#
#   bash train_moe.sh [DATA] [flags of train.py]
#
# DATA holds the folders src, mask, result and, if wanted, ref. It is looked up in the directory of
# the call, then beside this script; all other paths are relative to this script. Without DATA,
# make_data.py writes triplets, and without FLUX_FILL_ID the bundled tiny model is trained.
# For FLUX.1 Fill:
#
#   FLUX_FILL_ID=black-forest-labs/FLUX.1-Fill-dev \
#   FLUX_REDUX_ID=black-forest-labs/FLUX.1-Redux-dev \
#   MIXED_PRECISION=bf16 \
#   bash train_moe.sh my_triplets --gradient_checkpointing --vae_checkpointing
set -euo pipefail

data=${TRAIN_DATA_DIR:-}
if [[ $# -gt 0 && $1 != -* ]]; then
  data=$1
  shift
fi
if [[ -d $data ]]; then
  data=$(cd "$data" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -z $data ]]; then
  python ../demo/make_data.py --output_dir outputs/data
  data=outputs/data/train
fi
models=()
[[ -n ${FLUX_FILL_ID:-} ]] && models+=(--flux_fill_id "$FLUX_FILL_ID")
[[ -n ${FLUX_REDUX_ID:-} ]] && models+=(--flux_redux_id "$FLUX_REDUX_ID")

# shellcheck disable=SC2086  # ACCELERATE_FLAGS is a list, for example "--num_processes 4"
accelerate launch ${ACCELERATE_FLAGS:-} train.py \
  ${models[@]+"${models[@]}"} \
  --train_data_dir "$data" \
  --output_dir "${OUTPUT_DIR:-outputs/flux_removal}" \
  --logging_dir "${LOGGING_DIR:-./logs}" --report_to tensorboard \
  --mixed_precision "${MIXED_PRECISION:-no}" \
  --use_lora --num_experts 3 \
  --lora_r 256 --lora_alpha 256 --lora_dropout 0.0 \
  --routing_temperature 1.0 --routing_strategy soft \
  --enable_base_loss --base_loss_weight 1.0 \
  --enable_boundary_loss --boundary_loss_weight 0.3 \
  --enable_consistency_loss --consistency_loss_weight 0.5 \
  --enable_detail_loss --detail_loss_weight 0.2 \
  --enable_mask_info \
  --batch_size 2 --learning_rate 1e-4 \
  --max_train_steps "${MAX_TRAIN_STEPS:-5000}" --checkpointing_steps 500 \
  "$@"

#!/usr/bin/env bash
# Train in routing mode: all four losses, three experts and their router.
#
#   bash train_moe.sh DATA_DIR [further flags of train.py]
#
# Without further settings it trains the bundled tiny model. For FLUX.1 Fill:
#
#   FLUX_FILL_ID=black-forest-labs/FLUX.1-Fill-dev \
#   FLUX_REDUX_ID=black-forest-labs/FLUX.1-Redux-dev \
#   MIXED_PRECISION=bf16 bash train_moe.sh DATA_DIR --gradient_checkpointing --vae_checkpointing
#
# DATA_DIR holds the folders src, mask, result and ref; make_data.py writes such a folder.
set -euo pipefail
cd "$(dirname "$0")"

data_dir=${1:?"usage: bash train_moe.sh DATA_DIR [flags of train.py]"}
shift
models=()
[[ -n ${FLUX_FILL_ID:-} ]] && models+=(--flux_fill_id "$FLUX_FILL_ID")
[[ -n ${FLUX_REDUX_ID:-} ]] && models+=(--flux_redux_id "$FLUX_REDUX_ID")

accelerate launch ${ACCELERATE_FLAGS:-} train.py \
  "${models[@]}" \
  --train_data_dir "$data_dir" \
  --output_dir "${OUTPUT_DIR:-outputs}" \
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

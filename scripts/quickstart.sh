#!/usr/bin/env bash
# From a fresh clone to a fine-tuned model: makes .venv, trains a small language model on the standard library's sources with
# schedule-free AdamW, and prints what was saved. Arguments go to finetune_lm.py and win: scripts/quickstart.sh --max_steps 20
#
# PYTHON chooses the Python (>= 3.10). The output is in runs/quickstart, unless --output_dir says otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
make_venv plot
exec .venv/bin/python scripts/finetune_lm.py \
    --report \
    --output_dir runs/quickstart \
    --max_steps 800 \
    --per_device_train_batch_size 8 \
    --max_eval_samples 128 \
    --save_steps 0.5 \
    --dataloader_pin_memory False \
    "$@"

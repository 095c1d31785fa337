#!/usr/bin/env bash
# Sets up .venv and generates a video with the demo model, MagCache on. Can be run again: it reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_venv.sh

.venv/bin/python magcache_generate.py \
    --task t2v-tiny --size '64*64' --ckpt_dir examples/Wan2.1-T2V-tiny \
    --prompt "${1:-a red circle moves right on a white background}" --base_seed 1 \
    --use_magcache --magcache_speedup 2.5 \
    --save_file examples/quickstart.mp4

#!/usr/bin/env bash
# Slam (scaled), section 6: two A100 for 48 hours, DPO for two epochs. For Slam (large):
#     CONFIG=config/slam_large.py OUT=out/slam_large bash runs/slam_scaled.sh
export CONFIG=${CONFIG:-config/slam_scaled.py} DPO=${DPO:-config/slam_scaled_dpo.py}
export OUT=${OUT:-out/slam_scaled} GPUS=${GPUS:-2}
exec bash "$(dirname "$0")/slam_a5000.sh"

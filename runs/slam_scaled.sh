#!/usr/bin/env bash
# Slam (scaled): two A100 for 48 hours, DPO for two epochs; CONFIG=config/slam_large.py OUT=out/slam_large for Slam (large). Data as in slam_a5000.sh.
CONFIG=${CONFIG:-config/slam_scaled.py} OUT=${OUT:-out/slam_scaled} GPUS=${GPUS:-2} DPO=${DPO:-config/slam_scaled_dpo.py} \
    exec bash "$(dirname "$0")/slam_a5000.sh"

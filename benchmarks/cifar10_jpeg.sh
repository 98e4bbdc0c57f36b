#!/usr/bin/env bash
# Real input: CIFAR-10 as JPEG files. 3,000 training images are poisoned with a small ResNet in 8 epochs; small victims are tested on all
# 10,000 test images, first with the standard random crops and flips, then with flips only (as the source model saw the images).
# usage: benchmarks/cifar10_jpeg.sh CIFAR WORK     CIFAR has train/CLASS/*.jpg and test/CLASS/*.jpg; WORK is a new folder.
set -euo pipefail
cifar=$1 work=$2 results=benchmarks/results
miue-fast generate --data "$cifar/train" --per-class 300 --out "$work" --preset paper --model small_resnet --width 16 --epochs 8 --train-batch 32 \
    --eps 8/255 --export png --quiet
miue-fast verify "$cifar/train" "$work/images" --per-class 300 --eps 8/255
tested=(--data "$cifar/train" --per-class 300 --poisoned "$work/images" --test "$cifar/test" --victim small_resnet --seeds 2 --quiet)
miue-fast evaluate "${tested[@]}" --json $results/cifar10_jpeg.json --figure "$work/figure.png"
miue-fast evaluate "${tested[@]}" --crop 0 --json $results/cifar10_jpeg_flips.json

#!/usr/bin/env bash
# Real input: CIFAR-10 as JPEG files. 3,000 training images are poisoned with a small ResNet in 8 epochs; small victims are tested on all
# 10,000 test images, with the standard random crops and flips.
# usage: benchmarks/studies/cifar10_jpeg.sh CIFAR WORK [SEED [VICTIMS [EPOCHS]]]     CIFAR has train/CLASS/*.jpg and test/CLASS/*.jpg; WORK is a new folder.
# SEED and EPOCHS of the generation (7, 8), VICTIMS per training set (2). The settings were chosen on other training images, with seed 7
# (docs/performance-notes.md); another seed is a check of that choice.
set -euo pipefail
cifar=$1 work=$2 seed=${3:-7} victims=${4:-2} epochs=${5:-8}
name=benchmarks/results/cifar10_jpeg$([ "$epochs" = 8 ] || echo "_${epochs}epochs")$([ "$seed" = 7 ] || echo "_seed$seed")
miue-fast generate --data "$cifar/train" --per-class 300 --out "$work" --preset paper --model small_resnet --width 16 --epochs "$epochs" --train-batch 8 \
    --seed "$seed" --eps 8/255 --export png --quiet
miue-fast verify "$cifar/train" "$work/images" --per-class 300 --eps 8/255
tested=(--data "$cifar/train" --per-class 300 --poisoned "$work/images" --test "$cifar/test" --victim small_resnet --seeds "$victims" --quiet)
miue-fast evaluate "${tested[@]}" --json "$name.json" --figure "$work/figure.png"

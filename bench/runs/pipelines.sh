#!/usr/bin/env bash
# Training with both data pipelines and two seeds, on the demo's images and on real ones; two CPU cores, under an hour.
# usage: bash bench/runs/pipelines.sh   (COSA_SHARED: the folder that holds data/voc_animals and weights/)
set -euo pipefail
cd "$(dirname "$0")/../.."
shared=${COSA_SHARED:-../shared}
python=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE

real=(
  voc.yaml data.root="$shared/data/voc_animals" data.crop_size=160 data.workers=1
  model.backbone=tf_efficientnet_lite0 model.weights="$shared/weights/tf_efficientnet_lite0.safetensors"
  model.aux_layer=-1 "data.mean=[0.5,0.5,0.5]" "data.std=[0.5,0.5,0.5]"
  "teacher.scales=[1.0]" teacher.momentum=0.98 optim.batch_size=8 optim.lr=1e-4 optim.warmup=50
  optim.iterations=200 optim.cotrain_after=80 eval.every=1000 "eval.scales=[1.0]"
  "eval.classes=[cat,cow,dog,horse,person,sheep]" "eval.coexistence=[horse,sheep]"
)
for seed in 0 1; do
  for pipeline in torch dali; do
    run=(run.seed=$seed data.pipeline=$pipeline run.log_every=10 --overwrite)
    "$python" -m cosa_fast.train "${real[@]}" "${run[@]}" run.name=pipelines_real_${pipeline}_$seed
    "$python" -m cosa_fast.train demo.yaml "${run[@]}" run.name=pipelines_demo_${pipeline}_$seed
  done
done
"$python" -m bench.runs.curves runs/pipelines_* -o bench/results/pipelines_cpu.json

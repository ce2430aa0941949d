#!/usr/bin/env bash
# Everything that needs a GPU, ordered by worth, each part done in under ten minutes.
#
#     bash experiments/gpu.sh [PART ...]        parts: quality bench bench-compiled kernels     [all, in this order]
#     a trial without a GPU:  STEPS=3 MODELS=llama-tiny DATA=stdlib DEVICE=cpu DTYPE=fp32 bash experiments/gpu.sh
#
# quality needs text tokenised beforehand:  python data.py text FILE... --encoding gpt2 --out datasets/gpu
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out-gpu}
STEPS=${STEPS:-600}
MODELS=${MODELS:-llama-134m llama-500m llama-1b}
FIRST=${MODELS%% *}
DATA=${DATA:-datasets/gpu_train.bin}
DEVICE=${DEVICE:-cuda}
DTYPE=${DTYPE:-bf16}             # on a CPU bf16 can take minutes a step
mkdir -p "$OUT"

run() { # a name for the log, and the command; a part that fails does not end the others
    echo "== $1"
    timeout 590 "${@:2}" 2>&1 | tee "$OUT/$1.log" || echo "== $1 failed"
}

for part in ${*:-quality bench bench-compiled kernels}; do
    case $part in
    quality)        # eight workers simulated in one process, FLOP-matched
        common=(--model "$FIRST" --data "$DATA" --subnets 8 --coverage 6/8 --dtype "$DTYPE" --steps "$STEPS"
                --eval-every 200 --device "$DEVICE" --overwrite)
        run quality-ddp python train.py "${common[@]}" --coverage 1 --out-dir "$OUT/ddp"
        run quality-neuron python train.py "${common[@]}" --level neuron --flop-match --out-dir "$OUT/neuron"
        run quality-block python train.py "${common[@]}" --level block --flop-match --out-dir "$OUT/block"
        ;;
    bench)          # the workers with most to hold, one after another, without communication
        for model in $MODELS; do
            run "bench-$model" python experiments/bench.py --model "$model" --data stdlib --subnets 8 --dtype "$DTYPE" \
                --updates 6 --device "$DEVICE"
        done
        ;;
    bench-compiled)
        run "bench-compiled-$FIRST" python experiments/bench.py --model "$FIRST" --data stdlib --subnets 8 \
            --dtype "$DTYPE" --updates 6 --compile --device "$DEVICE"
        ;;
    kernels)
        run kernels python experiments/kernels.py
        ;;
    *)
        echo "error: no such part: $part" >&2
        exit 2
        ;;
    esac
done

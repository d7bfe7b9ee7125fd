#!/usr/bin/env bash
# scripts/compare_methods.py on a third model and other data: a small OLMoE that read
# English manual pages learns the German ones.
#
#     scripts/compare_manpages.sh --folder runs/manpages            # Debian, Ubuntu; needs pip install -e ".[bench]"
#     scripts/compare_manpages.sh --folder runs/manpages --arms usaf-default,lora-experts-attention --seeds 1
#
# Learned, chosen by and tested on: pages of programs. Held out: those of systemd and of the C library. Forgetting:
# English pages that the pretraining has not read. `scripts/pretrain_manpages.py` says more; it takes some 40 minutes on
# a core, once. The pages are those of the packages that apt knows (bookworm's, for docs/results/manpages).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WORK=${WORK:-data/manpages}                           # git-ignored; 70 MB
PRETRAINING_STEPS=${PRETRAINING_STEPS:-1500}
STEPS=${STEPS:-180} SEQ_LEN=${SEQ_LEN:-256} MICROBATCH=${MICROBATCH:-4}
TRAIN_FROM=${TRAIN_FROM:-0} FRAC=${FRAC:-0.02} EVAL_SAMPLES=${EVAL_SAMPLES:-32}
PYTHON=${PYTHON:-$(pwd)/.venv/bin/python}

if [ ! -x "$PYTHON" ]; then
    echo "error: PYTHON=$PYTHON: no such program; set PYTHON to one in which USAF is installed" >&2
    exit 2
fi
for tool in apt-get dpkg-deb; do
    if ! command -v "$tool" > /dev/null; then
        echo "error: the manual pages are in Debian's packages, and $tool is not here; run this on Debian or Ubuntu" >&2
        exit 2
    fi
done

if ! grep -qs held_out_perplexity "$WORK/moe/training_log.jsonl"; then  # its last line
    mkdir -p "$WORK/packages"
    for package in manpages manpages-dev git-man systemd manpages-de manpages-de-dev; do
        if [ ! -d "$WORK/packages/$package" ]; then
            (cd "$WORK/packages" && apt-get download "$package")
            dpkg-deb -x "$WORK/packages/${package}"_*.deb "$WORK/packages/$package.part"
            mv "$WORK/packages/$package.part" "$WORK/packages/$package"
        fi
    done
    CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$PYTHON" scripts/pretrain_manpages.py --pages "$WORK/packages" \
        --output "$WORK" --steps "$PRETRAINING_STEPS"
fi

exec "$PYTHON" scripts/compare_methods.py --model "$WORK/moe" --dataset "$WORK/train.jsonl" \
    --heldout "$WORK/systemd.jsonl" --heldout "$WORK/c_library.jsonl" --forgetting "$WORK/english.jsonl" \
    --steps "$STEPS" --seq-len "$SEQ_LEN" --microbatch "$MICROBATCH" --train-from "$TRAIN_FROM" --frac "$FRAC" \
    --eval-samples "$EVAL_SAMPLES" "$@"

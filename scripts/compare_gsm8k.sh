#!/usr/bin/env bash
# scripts/compare_methods.py on a real language model and text unlike the demo's: SmolLM2-135M-Instruct, made into a
# Mixture-of-Experts of 373 M weights (scripts/upcycle.py), learns GSM8K's form of answers through its chat template.
#
#     scripts/compare_gsm8k.sh --folder runs/gsm8k                  # Linux, macOS; needs pip install -e ".[bench,examples]"
#     scripts/compare_gsm8k.sh --folder runs/gsm8k --arms usaf-default,lora-experts-attention --seeds 1
#
# Learned, chosen by and tested on: the problems with two to four steps of calculation. Held out: those with six and more
# steps, which no run has seen the like of. Forgetting: the documentation that comes with Python. The experts were made
# from problems that are in neither (the last $CALIBRATION_PROBLEMS), and from chapters of that documentation.
#
# What is there already (the model, the MoE) is used again. Everything after the command's name goes to
# scripts/compare_methods.py, whose --help says what there is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WORK=${WORK:-data/smollm2}                            # git-ignored; 2 GB
CALIBRATION_PROBLEMS=${CALIBRATION_PROBLEMS:-473}
CALIBRATION=${CALIBRATION:-16384}                     # tokens to build the experts from
STEPS=${STEPS:-40} SEQ_LEN=${SEQ_LEN:-256} MICROBATCH=${MICROBATCH:-4}
TRAIN_FROM=${TRAIN_FROM:-25} FRAC=${FRAC:-0.02} EVAL_SAMPLES=${EVAL_SAMPLES:-16}
export PYTHONUTF8=1

if [ -z "${PYTHON:-}" ]; then
    for PYTHON in .venv/bin/python .venv/Scripts/python.exe "$(command -v python3 || command -v python || true)"; do
        if [ -x "$PYTHON" ]; then break; fi
    done
fi

if [ ! -x "$PYTHON" ]; then
    echo "error: no Python found; set PYTHON to one in which USAF is installed" >&2
    exit 2
fi

"$PYTHON" scripts/fetch_smollm2.py --output "$WORK"
mkdir -p "$WORK/compare"
"$PYTHON" - "$WORK/compare" "$CALIBRATION_PROBLEMS" <<'END'
"""The texts: problems by their number of steps, and chapters of Python's documentation."""
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

folder, last = Path(sys.argv[1]), int(sys.argv[2])
problems = [json.loads(line) for line in Path("data/gsm8k/train.jsonl").open(encoding="utf-8")]
steps = [problem["answer"].count("\n") for problem in problems]  # a line each, and one for the result
learned = list(zip(problems, steps))[:-last]
texts = {
    "calibration": problems[-last:],
    "short": [problem for problem, n in learned if n <= 4],
    "long": [problem for problem, n in learned if n >= 6],
    "python_docs": [{"text": topics[name]} for name in sorted(topics)],
}
for name, samples in texts.items():
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
END
if [ ! -f "$WORK/compare/moe/config.json" ]; then
    "$PYTHON" scripts/upcycle.py --model "$WORK/model" --output "$WORK/compare/moe" \
        --text "$WORK/compare/calibration.jsonl" --calibration-tokens "$CALIBRATION" --json "$WORK/compare/upcycle.json"
fi

exec "$PYTHON" scripts/compare_methods.py --model "$WORK/compare/moe" --dataset "$WORK/compare/short.jsonl" \
    --heldout "$WORK/compare/long.jsonl" --forgetting "$WORK/compare/python_docs.jsonl" --steps "$STEPS" \
    --seq-len "$SEQ_LEN" --microbatch "$MICROBATCH" --train-from "$TRAIN_FROM" --frac "$FRAC" \
    --eval-samples "$EVAL_SAMPLES" "$@"

#!/usr/bin/env bash
# Expected: studies with RandomSampler(seed=0) try the same learning rates and weight decays for every model.
# Happens:  the seed starts one stream of random numbers, and each suggest call takes the next. A model with one more
#           parameter, or with the same two asked for in another order, tries other configurations.
# Matters:  two models are compared on different samples of the space, though both were tuned "with seed 0"; one of
#           them may just have drawn the better ones. Equal are only configurations that were drawn once for all.
# Seen with Optuna 5.0.0, NumPy 2.4.6, Python 3.11:
#   of 8 configurations in common: 8 when repeated, 2 beside a dropout rate, 0 in another order
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" && "$folder/env/bin/pip" install --quiet "optuna==5.0.0" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
RANGES = {"lr": (1e-4, 1e-1), "weight_decay": (1e-6, 1e-2), "dropout": (1e-2, 0.5)}


def tried(*names):
    """The (lr, weight decay) of 8 trials of a model whose parameters are asked for in this order."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: sum(trial.suggest_float(name, *RANGES[name], log=True) for name in names), n_trials=8)
    return {(trial.params["lr"], trial.params["weight_decay"]) for trial in study.trials}


first = tried("lr", "weight_decay")
again, longer, swapped = (
    len(first & tried(*names))
    for names in (("lr", "weight_decay"), ("dropout", "lr", "weight_decay"), ("weight_decay", "lr"))
)
print(
    f"of 8 configurations in common: {again} when repeated, {longer} beside a dropout rate, "
    f"{swapped} in another order"
)
raise SystemExit((again, longer, swapped) != (8, 2, 0))
PYTHON

#!/usr/bin/env bash
# Expected: the same trials under the same HyperbandPruner are trained for the same number of epochs.
# Happens:  a trial's bracket is taken from a hash of the study's name and the trial's number. Another name stops other
#           trials, and the sum of epochs differs by a third (64 to 88 for eleven names of models).
# Matters:  a study is named after its model, so the name decides how much tuning a model gets; "each model had 12
#           trials under the same pruner" is no equal budget.
# Seen with Optuna 5.0.0, NumPy 2.4.6, Python 3.11:
#   12 equal trials took 64 epochs as resnet_cnn, 80 epochs as lenet5, 88 epochs as alexnet
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" && "$folder/env/bin/pip" install --quiet "optuna==5.0.0" "numpy==2.4.6" 2>/dev/null
"$folder/env/bin/python" - <<'PYTHON'
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)


def spent(name):
    """Tune under a name; the settings of all trials, and the epochs that they took."""
    epochs = 0

    def loss(trial):
        nonlocal epochs
        lr = trial.suggest_float("lr", 0, 1)
        for epoch in range(1, 10):
            epochs += 1
            trial.report(lr + 1 / epoch, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return lr

    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3)
    study = optuna.create_study(study_name=name, sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
    study.optimize(loss, n_trials=12)
    return [trial.params for trial in study.trials], epochs


names = ("resnet_cnn", "lenet5", "alexnet")
settings, epochs = zip(*map(spent, names))
assert settings[0] == settings[1] == settings[2]
print("12 equal trials took", ", ".join(f"{n} epochs as {name}" for name, n in zip(names, epochs)))
raise SystemExit(epochs != (64, 80, 88))
PYTHON

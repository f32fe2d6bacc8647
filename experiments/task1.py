"""Task 1: is it a cat or a dog?

Data      Kaggle samuelcortinhas/cats-and-dogs-image-classification: 557 photographs in train/, 140 in test/
Protocol  repeated holdout of train/, 5 times, train:validation 3:2; test/ scores every split, and nothing else
Expect    55 to 65 % on the test part, 60 to 72 % in validation: so few images teach little. Chance is 50 %, and a few
          points between models are noise
Time      5 to 8 minutes on 2 CPU cores

    python experiments/task1.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Kaggle, RepeatedHoldout
from experiments import Task, TrainingConfig, main

TASK = Task(
    name="task1",
    question="Cats or dogs?",
    data=Kaggle("samuelcortinhas/cats-and-dogs-image-classification", image_size=128, channels=3),
    protocol=RepeatedHoldout(n_splits=5, shares=(3, 2)),
    models=("lenet5", "vggnet", "resnetcnn", "seresnet"),
    training=TrainingConfig(batch_size=128, augment=True),
    experiment="task1-cats-vs-dogs",
)

if __name__ == "__main__":
    main(TASK)

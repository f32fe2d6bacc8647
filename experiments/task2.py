"""Task 2: is it a chihuahua or a muffin?

Data      Kaggle samuelcortinhas/muffin-vs-chihuahua-image-classification: 4,733 photographs in train/, 1,184 in test/
Protocol  stratified 5-fold cross-validation of train/; test/ scores every fold, and nothing else
Expect    about 83 % from LeNet-5 and 94 to 95 % from the others. 78 pictures are in both train/ and test/.
Time      about 3 hours on 2 CPU cores with --jobs 2, more than half of it EfficientNet-B0

    python experiments/task2.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Kaggle, StratifiedKFold
from experiments import Task, TrainingConfig, main

TASK = Task(
    name="task2",
    question="Chihuahua or muffin?",
    data=Kaggle("samuelcortinhas/muffin-vs-chihuahua-image-classification", image_size=128, channels=3),
    protocol=StratifiedKFold(n_splits=5),
    models=("lenet5", "vggnet", "resnetcnn", "efficientnet_lite", "efficientnet_b0"),
    training=TrainingConfig(batch_size=128, augment=True),
    experiment="task2-chihuahua-vs-muffin",
)

if __name__ == "__main__":
    main(TASK)

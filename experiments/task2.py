"""Task 2: is it a chihuahua or a muffin?

Data      Kaggle samuelcortinhas/muffin-vs-chihuahua-image-classification: 4,733 photographs in train/, 1,184 in test/
Protocol  stratified 5-fold cross-validation of train/; test/ scores every fold, and nothing else
Expect    about 80 % from LeNet-5 and 90 % and more from the others. 78 pictures are in both train/ and test/.
Time      some hours on 2 CPU cores, most of it EfficientNet-B0

    python experiments/task2.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import StratifiedKFold
from experiments import Task, TrainingConfig, main

TASK = Task(
    name="task2",
    question="Chihuahua or muffin?",
    protocol=StratifiedKFold(n_splits=5),
    models=("lenet5", "vggnet", "resnetcnn", "efficientnet_lite", "efficientnet_b0"),
    training=TrainingConfig(batch_size=128, augment=True),
)

if __name__ == "__main__":
    main(TASK)

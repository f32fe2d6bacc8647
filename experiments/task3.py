"""Task 3: which of ten garments is it?

Data      Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 70,000 images, its train and test part merged
Protocol  repeated holdout of all, 10 times, train:validation:test 2:49:49: what can be learned from 1,400 images?
Expect    about 76 % from LeNet-5 and 82 to 85 % from the others; 10 % is chance
Time      about 18 minutes on 2 CPU cores, most of it evaluation; 2.5 on an H200

    python experiments/task3.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import FashionMNIST, RepeatedHoldout
from experiments import Task, TrainingConfig, main

TASK = Task(
    name="task3",
    question="Which of ten garments?",
    data=FashionMNIST(),
    protocol=RepeatedHoldout(n_splits=10, shares=(2, 49, 49)),
    models=("lenet5", "vggnet", "resnetcnn", "seresnet"),
    training=TrainingConfig(batch_size=256, augment=False),
    experiment="task3-fashion-mnist",
)

if __name__ == "__main__":
    main(TASK)

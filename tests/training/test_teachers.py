"""The classifier that is trained before the tokenizer."""

import pytest
import torch

from detailflow.training.teachers import FeatureNetwork, train_classifier


@pytest.mark.parametrize("steps", [1, 3, 9, 10])
def test_the_accuracy_is_of_the_last_steps(steps: int):
    """Of one at least: all that this network can say is right."""
    batch = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    assert train_classifier(FeatureNetwork(1), [batch] * steps, steps, torch.float32, torch.device("cpu")) == 1.0

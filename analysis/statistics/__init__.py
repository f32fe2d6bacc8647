"""Statistics of scores over splits: one estimate from all scored images, and tests for scores of whole splits.

Scores of splits are not independent: splits share training images, and often the images that score them.
docs/statistics.md says which method suits which protocol, and how well each holds its error rate.

All functions raise a `ValueError` if there are too few splits, or a value is not finite or out of its range. None
takes a tie for certainty: equal differences other than 0 have no spread to test them by, and are refused.
"""

from analysis.statistics.checks import MIN_SPLITS, check_splits
from analysis.statistics.decisions import MAX_SPLITS, McNemar, holm, mcnemar, splits_needed
from analysis.statistics.estimate import (
    Arrangement,
    ScoreEstimate,
    VarianceParts,
    arrange,
    estimate,
    score_estimate,
    variance_parts,
)
from analysis.statistics.resampled import (
    Posterior,
    TTest,
    bayesian_correlated_ttest,
    component_standard_error,
    corrected_resampled_ttest,
    fixed_test_standard_error,
    image_variance,
    posterior,
    satterthwaite_df,
    ttest,
)

__all__ = [
    "MAX_SPLITS", "MIN_SPLITS", "Arrangement", "McNemar", "Posterior", "ScoreEstimate", "TTest", "VarianceParts",
    "arrange", "bayesian_correlated_ttest", "check_splits", "component_standard_error", "corrected_resampled_ttest",
    "estimate", "fixed_test_standard_error", "holm", "image_variance", "mcnemar", "posterior", "satterthwaite_df",
    "score_estimate", "splits_needed", "ttest", "variance_parts",
]  # fmt: skip

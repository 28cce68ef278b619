"""Scoring: log-probabilities of options, with logits at the options' tokens only."""

from jaguar.scoring.evaluation import evaluate
from jaguar.scoring.metrics import Scores, paired_se, roc_auc
from jaguar.scoring.scorer import Scorer

__all__ = ["Scorer", "Scores", "evaluate", "paired_se", "roc_auc"]

"""What is computed: drift metrics on outputs and on activations, each with its meaning declared."""

from diffsensor.metrics.activations import ACTIVATION_METRICS as ACTIVATION_METRICS
from diffsensor.metrics.activations import ActivationMetric as ActivationMetric
from diffsensor.metrics.cka import cka_distance as cka_distance
from diffsensor.metrics.cka import debiased_hsic as debiased_hsic
from diffsensor.metrics.outputs import FULL_METRICS as FULL_METRICS
from diffsensor.metrics.outputs import OUTPUT_METRICS as OUTPUT_METRICS
from diffsensor.metrics.outputs import OutputMetric as OutputMetric
from diffsensor.metrics.tiles import PairTile as PairTile
from diffsensor.metrics.tiles import Sums as Sums

"""How the server combines what travels: one rule a file."""

from fedlora_mini.federation.aggregation.error import AggregationError, aggregation_error
from fedlora_mini.federation.aggregation.fair import Fair
from fedlora_mini.federation.aggregation.masked import masked
from fedlora_mini.federation.aggregation.mean import mean
from fedlora_mini.federation.aggregation.nova import Nova
from fedlora_mini.federation.aggregation.optimisers import FedAdam, FedAvgM
from fedlora_mini.federation.aggregation.others import Others
from fedlora_mini.federation.aggregation.padded import padded, self_pruned_rank, tail, truncate
from fedlora_mini.federation.aggregation.prototypes import prototypes
from fedlora_mini.federation.aggregation.residual import residual
from fedlora_mini.federation.aggregation.robust import Krum, TrimmedMean, median
from fedlora_mini.federation.aggregation.selection import Selection
from fedlora_mini.federation.aggregation.stack import Stack
from fedlora_mini.federation.aggregation.svd import svd
from fedlora_mini.federation.aggregation.uniform import uniform
from fedlora_mini.federation.aggregation.weighted import weighted

__all__ = [
    "AggregationError",
    "Fair",
    "FedAdam",
    "FedAvgM",
    "Krum",
    "Nova",
    "Others",
    "Selection",
    "Stack",
    "TrimmedMean",
    "aggregation_error",
    "masked",
    "mean",
    "median",
    "padded",
    "prototypes",
    "residual",
    "self_pruned_rank",
    "svd",
    "tail",
    "truncate",
    "uniform",
    "weighted",
]

"""How near real sites are to the theory of who should share what (chapters 9, 10), and whether it shows.

If sites differ by a linear map of a layer's inputs, one B serves all; if by one of its outputs, one A does. Measured
here are the least linear maps between sites' features (`maps`), what the sites' own updates would lose by one A or one
B (`updates`), and whether what these predict is the order of the arms (`prediction`).

>>> from fedlora_mini.data import load
>>> from fedlora_mini.models import load_base
>>> data = load("phantom", sites=2, per_site=8, appearance=1.0)
>>> record = measure(load_base("minisam", 6, (64, 64)), data, config_of("phantom, appearance", "minisam", 0, steps=2))
>>> sorted(record["layers"]["encoder.patch"])
['dealt', 'dense', 'features', 'region', 'shape']
"""

from fedlora_mini.experiments.nearness.features import Rows, adapted_layers, inputs
from fedlora_mini.experiments.nearness.maps import beside, between, class_size, monge, monge_size, paired_map
from fedlora_mini.experiments.nearness.plot import figure
from fedlora_mini.experiments.nearness.prediction import (
    ARM_OF,
    Lean,
    Prediction,
    check,
    effects,
    expect,
    lean,
    predict,
    tables_of,
)
from fedlora_mini.experiments.nearness.records import (
    CASES,
    NETWORKS,
    config_of,
    measure,
    of,
    read,
    starts_of,
    study,
    table,
)
from fedlora_mini.experiments.nearness.updates import STARTS, dealt, errors_of, local_updates, sharing_errors

__all__ = [
    "ARM_OF",
    "CASES",
    "NETWORKS",
    "STARTS",
    "Lean",
    "Prediction",
    "Rows",
    "adapted_layers",
    "beside",
    "between",
    "check",
    "class_size",
    "config_of",
    "dealt",
    "effects",
    "errors_of",
    "expect",
    "figure",
    "inputs",
    "lean",
    "local_updates",
    "measure",
    "monge",
    "monge_size",
    "of",
    "paired_map",
    "predict",
    "read",
    "sharing_errors",
    "starts_of",
    "study",
    "table",
    "tables_of",
]

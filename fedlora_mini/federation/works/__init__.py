"""What a client does beside plain training: one idea a file."""

from fedlora_mini.federation.works.align import FedAS
from fedlora_mini.federation.works.average import MovingAverage
from fedlora_mini.federation.works.calibrate import Calibrated
from fedlora_mini.federation.works.ditto import Ditto
from fedlora_mini.federation.works.fusion import Fusion
from fedlora_mini.federation.works.pair import OwnPair
from fedlora_mini.federation.works.previous import Remember
from fedlora_mini.federation.works.prototypes import Prototypes
from fedlora_mini.federation.works.prune import SelfPruning
from fedlora_mini.federation.works.residual import ResFIM
from fedlora_mini.federation.works.selection import Selected
from fedlora_mini.federation.works.style import Style

__all__ = [
    "Calibrated",
    "Ditto",
    "FedAS",
    "Fusion",
    "MovingAverage",
    "OwnPair",
    "Prototypes",
    "Remember",
    "ResFIM",
    "Selected",
    "SelfPruning",
    "Style",
]

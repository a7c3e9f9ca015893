"""Methods as rows, and the one loop that runs them."""

from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.exchange import Request, Server, Update
from fedlora_mini.federation.loop import Engine, Round, federate
from fedlora_mini.federation.methods import METHODS, method
from fedlora_mini.federation.partition import dirichlet, repartition
from fedlora_mini.federation.row import Method, Work

__all__ = [
    "METHODS",
    "Budget",
    "Engine",
    "Method",
    "Request",
    "Round",
    "Server",
    "Update",
    "Work",
    "dirichlet",
    "federate",
    "method",
    "repartition",
    "train",
]

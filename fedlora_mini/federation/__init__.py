"""Methods as rows, and the one loop that runs them."""

from fedlora_mini.federation.client import Budget, train
from fedlora_mini.federation.exchange import Request, Server, Update
from fedlora_mini.federation.loop import Engine, Round, federate
from fedlora_mini.federation.methods import METHODS, Method, method
from fedlora_mini.federation.partition import dirichlet, repartition

__all__ = [
    "METHODS",
    "Budget",
    "Engine",
    "Method",
    "Request",
    "Round",
    "Server",
    "Update",
    "dirichlet",
    "federate",
    "method",
    "repartition",
    "train",
]

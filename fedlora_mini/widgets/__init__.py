"""Live pictures: with a kernel they are traits to set from Python, in the rendered book they run in the page alone.

Nothing in the library imports this package: anywidget and ipywidgets load when a chapter asks for a widget.
"""

from .base import PageWidget
from .leakage import SubspaceLeakage
from .product_noise import ProductNoise, product_density
from .soft_threshold import SoftThreshold, proximal_path, soft_threshold

__all__ = [
    "PageWidget",
    "ProductNoise",
    "SoftThreshold",
    "SubspaceLeakage",
    "product_density",
    "proximal_path",
    "soft_threshold",
]

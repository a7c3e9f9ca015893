"""Federated, personalised, differentially private low-rank adaptation for medical image segmentation."""

__version__ = "0.1.0"

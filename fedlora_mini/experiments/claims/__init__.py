"""Every sentence of the form "X beats Y" that the book makes, and the verdict that stored runs give it.

A claim is written down before it is run: its arms, data, protocol, metric, sign and margin. One that was not says
`seen`. Nothing here is a result.
"""

from fedlora_mini.experiments.claims.claim import MARGIN, Claim
from fedlora_mini.experiments.claims.judging import Verdict, judge, results_folder, verdict, verdicts
from fedlora_mini.experiments.claims.table import CLAIMS, PRIVACY

__all__ = ["CLAIMS", "MARGIN", "PRIVACY", "Claim", "Verdict", "judge", "results_folder", "verdict", "verdicts"]

"""All claims, in the order of the book's table of verdicts."""

from fedlora_mini.experiments.claims.claim import Claim
from fedlora_mini.experiments.claims.fewshot import FEWSHOT
from fedlora_mini.experiments.claims.personal import PERSONAL, RESFIM
from fedlora_mini.experiments.claims.privacy import DIGITS
from fedlora_mini.experiments.claims.private_data import ELSEWHERE
from fedlora_mini.experiments.claims.sharing import AVERAGING, TWO_BY_TWO
from fedlora_mini.experiments.claims.sites import SITES

PRIVACY: dict[str, Claim] = DIGITS | ELSEWHERE
CLAIMS: dict[str, Claim] = {
    **AVERAGING,
    **TWO_BY_TWO,
    **RESFIM,
    **SITES,
    **PERSONAL,
    **FEWSHOT,
    **PRIVACY,
}

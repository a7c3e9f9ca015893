"""The same questions at real sites: polyps of five hospitals, gliomas of four institutions, four domains of nuclei."""

from fedlora_mini.experiments.claims.claim import Claim

HEAD_AND_BYTES = "bytes sent (none by a site alone), and the head: IAT shares it, a site alone keeps it"


PREDICTED = "as the sites' own updates predict"


def _hospitals(name: str, what: str, seen: bool = False, one_factor: str = PREDICTED) -> dict[str, Claim]:
    """The claims on one set of real sites. `near-…`: the signs that `results/nearness.jsonl` predicts for it.

    one_factor: what the sites' own updates say of one A against one B everywhere.
    """

    def claim(
        text: str, a: str, b: str, sign: int = +1, source: str = "zhao2026iat", not_matched: str = "bytes sent"
    ) -> Claim:
        results = f"hospitals_{name}.jsonl"
        return Claim(f"On {what}, {text}", a, b, results, sign, source=source, not_matched=not_matched, seen=seen)

    own, sor = "on each one's own data", "iat_sor:form=exact,lam=0.01"
    return {
        f"iat-over-fedsa-{name}": claim(f"IAT's assignment beats FedSA's {own}.", "iat_own_head", "fedsa"),
        f"iat-over-fedit-{name}": claim(f"IAT beats one LoRA for all (FedIT) {own}.", "iat", "fedit"),
        f"iat-over-local-{name}": claim(
            f"IAT's sharing beats training alone {own}.", "iat", "local", not_matched=HEAD_AND_BYTES
        ),
        f"sor-improves-{name}": claim(f"SOR improves IAT's Dice {own}.", sor, "iat", not_matched="nothing"),
        f"near-one-factor-{name}": claim(
            f"one A everywhere is better than one B everywhere, {one_factor}.", "inverse_fedsa", "fedsa", -1, source=""
        ),
        f"near-two-factors-{name}": claim(
            f"the assignment opposite to IAT's is better, {PREDICTED}.", "iat_own_head", "anti_own_head", -1, source=""
        ),
    }


SITES: dict[str, Claim] = {
    **_hospitals("polypgen", "five hospitals' polyps"),
    **_hospitals("lgg", "gliomas of four institutions"),
    **_hospitals(
        "nuclei", "four domains of nuclei", True, "the side to which the sites' own updates lean, within the noise"
    ),
}

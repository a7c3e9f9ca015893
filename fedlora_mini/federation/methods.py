"""THE TABLE: a federated method is a row. Each differs from its neighbours in the cell that its paper is about."""

from fedlora_mini.errors import unknown
from fedlora_mini.federation.aggregation.fair import Fair
from fedlora_mini.federation.aggregation.masked import masked
from fedlora_mini.federation.aggregation.nova import Nova
from fedlora_mini.federation.aggregation.optimisers import FedAdam, FedAvgM
from fedlora_mini.federation.aggregation.others import Others
from fedlora_mini.federation.aggregation.padded import padded
from fedlora_mini.federation.aggregation.prototypes import prototypes
from fedlora_mini.federation.aggregation.residual import residual
from fedlora_mini.federation.aggregation.robust import Krum, TrimmedMean, median
from fedlora_mini.federation.aggregation.selection import Selection
from fedlora_mini.federation.aggregation.stack import Stack
from fedlora_mini.federation.aggregation.svd import svd
from fedlora_mini.federation.aggregation.uniform import uniform
from fedlora_mini.federation.aggregation.weighted import weighted
from fedlora_mini.federation.row import Method
from fedlora_mini.federation.schedule import as_told, before, by_round, by_step, only
from fedlora_mini.federation.sharing import (
    all_but_head,
    all_but_norms,
    common,
    decoder_only,
    encoder_only,
    everything,
    factors,
    nothing,
)
from fedlora_mini.federation.works import (
    Calibrated,
    Ditto,
    FedAS,
    Fusion,
    MovingAverage,
    OwnPair,
    Prototypes,
    Remember,
    ResFIM,
    Selected,
    SelfPruning,
    Style,
)
from fedlora_mini.regularizers import Anchor, Riemannian
from fedlora_mini.regularizers.ascent import Ascent
from fedlora_mini.regularizers.contrast import Contrast
from fedlora_mini.regularizers.distill import Distill
from fedlora_mini.regularizers.episode import Episode
from fedlora_mini.regularizers.harmony import Harmonised
from fedlora_mini.regularizers.prototype import NearPrototypes
from fedlora_mini.regularizers.subspace import SOR

head_first = before(0.3, lambda key: key.region == "head", "head in the first 30 % of steps, then the body")
own_first = before(0.5, lambda key: key.factor.endswith("_own"), "own factors in the first half of steps, then common")
local_first = before(0.3, lambda key: key.region == "head", "head in the first 30 % of steps, then all", then_all=True)
iat_factors = factors("B", "A", head=True)

METHODS: dict[str, Method] = {
    # anchors: what a federation has to beat, and what it cannot have
    "local": Method("local only", "lora", nothing),
    "pooled": Method("pooled data", "lora", everything, pooled=True),
    # low-rank, one model for all
    "fedit": Method("FedIT", "lora", everything, reference="zhang2024fedit"),
    "fedprox": Method("FedIT + FedProx", "lora", everything, objective=(Anchor(0.01),), reference="li2020fedprox"),
    "ffa": Method("FFA-LoRA", "lora", everything, only("B"), reference="sun2024ffalora"),
    "rolora": Method("RoLoRA", "lora", everything, by_round("B", "A"), reference="chen2024rolora"),
    "flora": Method("FLoRA", "lora", everything, rule=Stack(), reference="wang2024flora"),
    "hetlora": Method("HetLoRA", "lora", everything, rule=padded, work=SelfPruning(), reference="cho2024hetlora"),
    "flexlora": Method("FlexLoRA", "lora", everything, rule=svd, reference="bai2024flexlora"),
    "fedex": Method("FedEx-LoRA", "lora", everything, rule=residual, reference="singhal2025fedex"),
    "lora_fair": Method("LoRA-FAIR, ridge", "lora", everything, rule=Fair(), reference="bian2025lorafair"),
    "lora_fair_cosine": Method(
        "LoRA-FAIR", "lora", everything, rule=Fair(solve="optimised"), reference="bian2025lorafair"
    ),
    # low-rank, for private gradients: LA-LoRA's own filter is `but(filter="low-pass")`, which every row takes
    "la_lora": Method("LA-LoRA", "lora", everything, by_step("B", "A"), reference="liu2026lalora"),
    "la_lora_pre": Method(
        "LA-LoRA, preconditioned",
        "lora",
        everything,
        by_step("B", "A"),
        objective=(Riemannian(1e-6),),
        reference="liu2026lalora",
    ),
    "as_lora": Method(
        "AS-LoRA", "lora", everything, as_told, rule=Selection(), work=Selected(), reference="kim2026aslora"
    ),
    # low-rank, personal: which factor stays at the site
    "fedsa": Method("FedSA-LoRA", "lora", factors("A", "A", head=False), reference="guo2025fedsa"),
    "fedsa_sor": Method("FedSA + SOR", "lora", factors("A", "A", head=False), objective=(SOR(encoder="A"),)),
    "inverse_fedsa": Method("inverse FedSA", "lora", factors("B", "B", head=False)),
    "inverse_fedsa_sor": Method(
        "inverse FedSA + SOR", "lora", factors("B", "B", head=False), objective=(SOR(decoder="B"),)
    ),
    "iat": Method("IAT sharing", "lora", iat_factors, reference="zhao2026iat"),
    "iat_sor": Method("IAT + SOR", "lora", iat_factors, objective=(SOR(),), reference="zhao2026iat"),
    "anti_iat": Method("anti-IAT (control)", "lora", factors("A", "B", head=True)),
    "iat_own_head": Method("IAT, own head", "lora", factors("B", "A", head=False), reference="zhao2026iat"),
    "anti_own_head": Method("anti-IAT, own head", "lora", factors("A", "B", head=False)),
    "anti_sor": Method(
        "anti-IAT + SOR, own head", "lora", factors("A", "B", head=False), objective=(SOR(encoder="A", decoder="B"),)
    ),
    "encoder_local": Method("encoder at the site", "lora", decoder_only),
    "decoder_local": Method("decoder at the site", "lora", encoder_only),
    "resfim_lora": Method("pFL-ResFIM on LoRA", "lora", everything, rule=masked, work=ResFIM()),
    # low-rank, two branches or a mixture: one that is shared, one that stays
    "dual": Method("dual branch", "dual", common()),
    "dual_sor": Method("dual branch + SOR", "dual", common(), objective=(SOR(form="dual"),)),
    "dual_alike": Method("dual branch, one start", "dual_alike", common()),
    "dual_alike_sor": Method("dual branch, one start + SOR", "dual_alike", common(), objective=(SOR(form="dual"),)),
    "client_tailored": Method("client-tailored adapter", "dual", common(head=False), reference="hu2025tailored"),
    "fdlora": Method(
        "FDLoRA", "fdlora", common(), rule=FedAvgM(nesterov=True), work=Fusion(), reference="qi2024fdlora"
    ),
    "fedalt": Method("FedALT", "fedalt", common(), rule=Others(), work=OwnPair(), reference="bian2026fedalt"),
    "hydra": Method("HydraLoRA, federated", "hydra", factors("A", "A", head=False), reference="tian2024hydralora"),
    "pfedlora": Method("pFedLoRA", "pfedlora", common(), own_first, reference="yi2023pfedlora"),
    "pfedsam": Method("pFedSAM", "pfedsam", common(), objective=(Distill(),), reference="wang2025pfedsam"),
    # full weights, one model for all
    "fedavg": Method("FedAvg", "full", everything, reference="mcmahan2017fedavg"),
    "fedprox_full": Method("FedProx", "full", everything, objective=(Anchor(0.01),), reference="li2020fedprox"),
    "fednova": Method(  # FedAvg at equal steps: for `passes` and SGD
        "FedNova", "full", everything, rule=Nova(), reference="wang2020fednova"
    ),
    "harmofl": Method(
        "HarmoFL",
        "full",
        everything,
        rule=uniform,
        objective=(Harmonised(), Ascent()),
        work=Style(),
        reference="jiang2022harmofl",
    ),
    "feddg": Method(
        "FedDG-ELCFS", "full", everything, objective=(Episode(),), work=Style(bank=True), reference="liu2021feddg"
    ),
    "moon": Method("MOON", "full", everything, objective=(Contrast(),), work=Remember(), reference="li2021moon"),
    "fedfms": Method("FedFMS, all weights (FedSAM)", "full", everything, reference="liu2024fedfms"),
    "fedmsa": Method("FedFMS, adapters and decoder (FedMSA)", "fedmsa", everything, reference="liu2024fedfms"),
    # full weights, personal
    "fedbn": Method("FedBN", "full", all_but_norms, reference="li2021fedbn"),
    "fedrep": Method("FedRep", "full", all_but_head, head_first, reference="collins2021fedrep"),
    "ditto": Method("Ditto", "full", everything, work=Ditto(), reference="li2021ditto"),
    "fedas": Method("FedAS", "full", all_but_head, rule=weighted, work=FedAS(), reference="yang2024fedas"),
    "fedproto": Method(
        "FedProto",
        "full",
        nothing,
        rule=prototypes,
        objective=(NearPrototypes(),),
        work=Prototypes(),
        reference="tan2022fedproto",
    ),
    "iop": Method("IOP-FL", "full", everything, work=MovingAverage(), reference="jiang2023iopfl"),
    "lcfed": Method(
        "LC-Fed", "lcfed", common(head=False), local_first, rule=uniform, work=Calibrated(), reference="wang2022lcfed"
    ),
    "resfim": Method("pFL-ResFIM", "full", everything, rule=masked, work=ResFIM(), reference="zhu2026resfim"),
    # server optimisers and robust rules, on FedIT
    "fedavgm": Method("FedIT + FedAvgM", "lora", everything, rule=FedAvgM(), reference="hsu2019fedavgm"),
    "fedadam": Method("FedIT + FedAdam", "lora", everything, rule=FedAdam(), reference="reddi2021adaptive"),
    "median": Method("FedIT, median", "lora", everything, rule=median, reference="yin2018byzantine"),
    "trimmed": Method("FedIT, trimmed mean", "lora", everything, rule=TrimmedMean(), reference="yin2018byzantine"),
    "krum": Method("FedIT, Krum", "lora", everything, rule=Krum(), reference="blanchard2017krum"),
}


def method(name: str) -> Method:
    """The row of that name."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]

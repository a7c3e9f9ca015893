"""(B + N_B)(A + N_A) - B A = N_B A + B N_A + N_B N_A: what noise on the factors does to their product, term by term.

Chapter 16. B: (m, r), A: (r, n); an m x n is never formed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora_mini.adapters.base import adapters
from fedlora_mini.adapters.lora import LoRA
from fedlora_mini.errors import FedloraError, unknown
from fedlora_mini.state import State
from fedlora_mini.thin import inner, norm2


@dataclass(frozen=True)
class NoiseEnergy:
    """||N_B A||², ||B N_A||², ||N_B N_A||² and the square of their sum's norm, which is their sum in the mean only."""

    from_B: float
    from_A: float
    product: float
    total: float

    def __add__(self, other: "NoiseEnergy") -> "NoiseEnergy":
        """Of two layers together."""
        pairs = zip(_values(self), _values(other), strict=True)
        return NoiseEnergy(*(x + y for x, y in pairs))


def _values(e: NoiseEnergy) -> tuple[float, float, float, float]:
    return e.from_B, e.from_A, e.product, e.total


def expected_energy(
    B: Tensor, A: Tensor, std_B: float, std_A: float, steps: tuple[int, int] = (1, 1), scale: float = 1.0
) -> NoiseEnergy:
    """s² (m T_B σ_B² ||A||² + n T_A σ_A² ||B||² + m n r T_B σ_B² T_A σ_A²): the mean after T_B and T_A noisy steps.

    std_B and std_A are those of one step's change of the factor (learning rate times the noise on the gradient),
    `steps` = (T_B, T_A) says how often each moved, see `noisy_steps`. Noise alone: no gradient answers it.
    """
    (m, r), n = B.shape, A.shape[1]
    var_B, var_A = steps[0] * std_B**2, steps[1] * std_A**2
    from_B = scale**2 * m * var_B * float(A.double().square().sum())
    from_A = scale**2 * n * var_A * float(B.double().square().sum())
    product = scale**2 * m * n * r * var_B * var_A
    return NoiseEnergy(from_B, from_A, product, from_B + from_A + product)


def energy(B: Tensor, A: Tensor, N_B: Tensor, N_A: Tensor) -> NoiseEnergy:
    """Of given noise, by ||X Y||² = tr((XᵀX)(Y Yᵀ)). With leading axes on N_B (…, m, r) and N_A (…, r, n): the mean."""
    B, A, N_B, N_A = (value.double() for value in (B, A, N_B, N_A))
    A_, B_ = A.expand(*N_A.shape), B.expand(*N_B.shape)
    whole = norm2(torch.cat([N_B, B_ + N_B], -1), torch.cat([A_, N_A], -2))  # N_B A + (B + N_B) N_A
    return NoiseEnergy(*(float(e.mean()) for e in (norm2(N_B, A), norm2(B, N_A), norm2(N_B, N_A), whole)))


# ---------------------------------------------------------------- several steps


SCHEDULES: dict[str, Callable[[int], str]] = {
    "simultaneous": lambda step: "BA",
    "alternating": lambda step: "B" if step % 2 else "A",  # steps from 1: B first
    "B only": lambda step: "B",
}
"""Which factors one step moves."""


def noisy_steps(schedule: str, steps: int) -> tuple[int, int]:
    """(T_B, T_A): how many of the steps put noise on each factor. K alternating steps give K/2 simultaneous ones'."""
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    moved = "".join(SCHEDULES[schedule](step) for step in range(1, steps + 1))
    return moved.count("B"), moved.count("A")


def random_walk(
    B: Tensor,
    A: Tensor,
    std_B: float,
    std_A: float,
    schedule: str,
    steps: int,
    generators: Sequence[torch.Generator],
    draws: int = 1,
) -> tuple[Tensor, Tensor]:
    """The factors after noise-only steps: (draws, m, r) and (draws, r, n).

    generators: one for B's noise and one for A's, so that two schedules that move a factor equally often give it the
    same noise.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    now = {"B": B.double().repeat(draws, 1, 1), "A": A.double().repeat(draws, 1, 1)}
    chance = {"B": (std_B, generators[0]), "A": (std_A, generators[1])}
    for step in range(1, steps + 1):
        for name in SCHEDULES[schedule](step):
            std, generator = chance[name]
            now[name] = now[name] + std * torch.randn(now[name].shape, generator=generator, dtype=torch.float64)
    return now["B"], now["A"]


def injected_energy(
    B: Tensor,
    A: Tensor,
    std: float,
    schedule: str,
    steps: int,
    generators: Sequence[torch.Generator],
    draws: int = 200,
) -> NoiseEnergy:
    """`energy` of noise-only steps, mean of `draws` walks. In expectation: `expected_energy` at `noisy_steps`."""
    B_, A_ = random_walk(B, A, std, std, schedule, steps, generators, draws)
    return energy(B, A, B_ - B.double(), A_ - A.double())


def state_energy(
    model: nn.Module, state: Mapping[str, Tensor], std_B: float, std_A: float, steps: tuple[int, int] = (1, 1)
) -> NoiseEnergy:
    """`expected_energy` of the whole model: the sum over its LoRA layers, each with its own scale s."""
    layers = [(path, layer) for path, layer in adapters(model) if isinstance(layer, LoRA)]
    if not layers:
        raise FedloraError(f"{type(model).__name__} has no LoRA layer, so there is no product B A for noise to enter")
    total = NoiseEnergy(0.0, 0.0, 0.0, 0.0)
    for path, layer in layers:
        B, A = state[f"{path}.B"], state[f"{path}.A"]
        total = total + expected_energy(B, A, std_B, std_A, steps, layer.scaling)
    return total


# ---------------------------------------------------------------- coupling of the two gradients


def coupling_cosine(B: Tensor, A: Tensor, grad_B: Tensor, grad_A: Tensor) -> float:
    """cos(∇_B A, B ∇_A): the angle between the changes of B A that the two gradients ask for; 0 where one asks nothing.

    Exact gradients give at least 0: ⟨G AᵀA, B Bᵀ G⟩ = ||Bᵀ G Aᵀ||² (s = 1). Reconstruction: how the paper compares
    gradients of different shape is not known.
    """
    B, A, grad_B, grad_A = (value.double() for value in (B, A, grad_B, grad_A))
    norms = norm2(grad_B, A) * norm2(B, grad_A)
    return float(inner(grad_B, A, B, grad_A) / norms.sqrt()) if norms > 0 else 0.0


def couplings(state: State, gradient: State) -> dict[str, float]:
    """path -> `coupling_cosine` of every layer of which the gradient has both A and B."""
    paths = [name[:-2] for name in gradient if name.endswith(".B") and f"{name[:-2]}.A" in gradient]
    return {
        path: coupling_cosine(*(tensors[f"{path}.{factor}"] for tensors in (state, gradient) for factor in "BA"))
        for path in paths
    }

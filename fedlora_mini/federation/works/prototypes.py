"""c_y = mean of z over the voxels of class y: a client that tells the server one vector a class. FedProto, Tan 2022."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_mini.adapters.features import class_means, embed, in_use
from fedlora_mini.federation.aggregation.messages import COUNT, PROTOTYPE
from fedlora_mini.federation.member import Member
from fedlora_mini.federation.row import Work
from fedlora_mini.state import State


@torch.no_grad()
def prototypes(client: Member, state: State, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Over all its training images: (C, c) in the order of classes, and voxels by class (C,)."""
    sums = counts = torch.zeros(())
    model = client.setting.model
    with in_use(model):
        for x, y in zip(client.data.images.split(batch), client.data.masks.split(batch), strict=True):
            logits, z = embed(model, state, client.setting.method.images(x, client.notes))
            mean, count = class_means(z, y, logits.shape[1])
            sums, counts = sums + mean * count[:, None], counts + count
    return sums / counts.clamp(min=1)[:, None], counts


@dataclass(frozen=True)
class Prototypes(Work):
    """Trains, then sends its prototypes, each with the number of voxels behind it."""

    messages = (PROTOTYPE, COUNT)
    label = "sends class prototypes"

    def round(self, client: Member, round: int) -> tuple[State, float, State]:
        end, loss = client.fit(round)
        vectors, counts = prototypes(client, end)
        return end, loss, {PROTOTYPE: vectors, COUNT: counts}

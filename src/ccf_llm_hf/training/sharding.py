"""A backbone shared out over the processes of a training, by FSDP2.

accelerate's own FSDP shards what learns too. Here that is megabytes, with scalars among it, which
FSDP2 refuses; so it stays whole and is trained by DDP, and the frozen backbone, which is what does
not fit, is what is shared out (our choice). Checkpoints, resuming and optimizer know no difference.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR

ASKED = "ACCELERATE_USE_FSDP"  # what `distributed_type: FSDP` of accelerate's config sets


def sharding_asked() -> bool:
    """Whether accelerate was told to train by FSDP."""
    return os.environ.get(ASKED, "false").lower() == "true"


@contextmanager
def by_ddp() -> Iterator[None]:
    """Have accelerate wrap the model by DDP, whatever its config says."""
    asked = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[ASKED] = asked


def shard_backbone(model: CCFLLMForCTR, device: torch.device, processes: int) -> None:
    """Leave each process its share of the frozen backbone; a layer's weights are gathered while it
    is computed. Everything else moves to `device` whole.

    Every process has to call the model as often as the others from now on.
    """
    mesh = init_device_mesh(device.type, (processes,))
    backbone = model.language_model
    frozen = {weight for weight in backbone.parameters() if not weight.requires_grad}
    whole = {weight for weight in model.parameters() if weight not in frozen}
    for weight in whole:
        weight.data = weight.data.to(device)
    layers = next(
        part
        for part in backbone.modules()
        if isinstance(part, nn.ModuleList) and len(part) == backbone.config.num_hidden_layers
    )
    for part in (*layers, model.get_input_embeddings(), model):
        # Gathered anew for each pass, the model itself too: the process that saves drops what it
        # has gathered, and the others would not gather with it.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # Of DDP, which would send each process the first one's share.
    model._ddp_params_and_buffers_to_ignore = [
        name for name, weight in model.named_parameters() if not weight.requires_grad
    ]

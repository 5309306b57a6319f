"""MIGU and KIF in a loop with FSDP2 (`fully_shard`): two ranks."""

import torch
from common import TASKS, batches, meet, model_and_tokenizer, start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cl_dist


def main():
    meet()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    model, tokenizer = model_and_tokenizer()
    mesh = init_device_mesh(device.type, (ranks,))
    for part in (*model.to(device).model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    with cl_dist.continual(model, optimizer, method=["kif", {"name": "migu", "threshold": 0.7}]) as session:
        for task in TASKS:
            session.task(task)
            for batch in batches(task, tokenizer, 4, rank, ranks):
                model(**batch.to(device)).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    start(main, ranks=2)

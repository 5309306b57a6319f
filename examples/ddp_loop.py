"""MIGU in a loop with DistributedDataParallel and gradient accumulation: two ranks."""

from contextlib import nullcontext

import torch
from common import TASKS, batches, meet, model_and_tokenizer, start
from torch.nn.parallel import DistributedDataParallel

import cl_dist

ACCUMULATION = 2


def main():
    meet()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    model, tokenizer = model_and_tokenizer()
    ddp = DistributedDataParallel(model.to(device)).train()
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-4)
    options = {"gradient_accumulation": ACCUMULATION, "threshold": 0.7}
    with cl_dist.continual(ddp, optimizer, method="migu", **options) as session:
        for task in TASKS:
            session.task(task)
            for number, batch in enumerate(batches(task, tokenizer, 2, rank, ranks), 1):
                last = number % ACCUMULATION == 0
                with nullcontext() if last else ddp.no_sync():
                    loss = ddp(**batch.to(device)).loss / ACCUMULATION
                    loss.backward()
                if last:
                    torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()


if __name__ == "__main__":
    start(main, ranks=2)

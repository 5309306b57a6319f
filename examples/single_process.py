"""MIGU and KIF in a plain PyTorch loop: two tasks, one process."""

import torch
from common import TASKS, batches, model_and_tokenizer, start

import cl_dist


def main():
    model, tokenizer = model_and_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    with cl_dist.continual(model, optimizer, method=["kif", {"name": "migu", "threshold": 0.7}]) as session:
        for task in TASKS:
            session.task(task)
            for batch in batches(task, tokenizer):
                loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            print(f"{task}: loss {loss.item():.3f}")


if __name__ == "__main__":
    start(main)

"""MIGU in a loop with accelerate, gradient accumulation and a scheduler: two ranks."""

import torch
from accelerate import Accelerator
from common import TASKS, encoded, model_and_tokenizer, start
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_constant_schedule_with_warmup

import cl_dist


def main():
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model, tokenizer = model_and_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = get_constant_schedule_with_warmup(optimizer, 2)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    pad = DataCollatorForSeq2Seq(tokenizer)
    model.train()
    with cl_dist.continual(model, optimizer, method="migu", threshold=0.7) as session:
        for task in TASKS:
            session.task(task)
            loader = DataLoader(encoded(task, tokenizer), batch_size=2, collate_fn=pad, shuffle=True)
            for batch in accelerator.prepare(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()


if __name__ == "__main__":
    start(main, ranks=2)

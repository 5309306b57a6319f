"""MIGU and KIF around a DeepSpeed engine at ZeRO stage 3: two ranks."""

import torch
from common import TASKS, batches, meet, model_and_tokenizer, start, zero

import cl_dist


def main():
    meet()
    import deepspeed

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, tokenizer = model_and_tokenizer()
    config = zero(3) | {"train_batch_size": 4 * ranks, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
    config |= {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    with cl_dist.continual(engine, method=["kif", {"name": "migu", "threshold": 0.7}]) as session:
        for task in TASKS:
            session.task(task)
            for batch in batches(task, tokenizer, 4, rank, ranks):
                loss = engine(**batch.to(engine.device)).loss
                engine.backward(loss)
                engine.step()


if __name__ == "__main__":
    start(main, ranks=2)

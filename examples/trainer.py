"""MIGU and KIF in transformers' Trainer at ZeRO stage 2: one train() is one task; two ranks."""

import tempfile

from common import TASKS, deepspeed_on_cpu, encoded, model_and_tokenizer, start, zero

import cl_dist


def main():
    deepspeed_on_cpu()
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, deepspeed=zero(2), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-4,
            optim="adamw_torch", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        model, tokenizer = model_and_tokenizer()
        data = {task: encoded(task, tokenizer) for task in TASKS}
        trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), train_dataset=data[TASKS[0]])
        with cl_dist.continual(trainer, method=["kif", {"name": "migu", "threshold": 0.7}]) as session:
            for task in TASKS:
                session.task(task)
                trainer.train_dataset = data[task]
                trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    start(main, ranks=2)

"""MIGU in TRL's SFTTrainer at ZeRO stage 3, on conversations: two ranks."""

import tempfile

from common import TASKS, chats, deepspeed_on_cpu, model_and_tokenizer, start, zero

from cl_dist import ContinualCallback


def main():
    deepspeed_on_cpu()
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, deepspeed=zero(3), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-4,
            optim="adamw_torch", save_strategy="no", report_to=[], disable_tqdm=True, max_length=256, bf16=False,
            assistant_only_loss=False, gradient_checkpointing=False,
        )  # fmt: skip
        model, tokenizer = model_and_tokenizer()
        migu = ContinualCallback(method="migu", threshold=0.7)
        data = {task: chats(task) for task in TASKS}
        # SFTTrainer tokenises what it is given here; every task's conversations, because it gets them all to evaluate.
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=data[TASKS[0]],
            eval_dataset=data,
            processing_class=tokenizer,
            callbacks=[migu],
        )
        for task in TASKS:
            migu.session.task(task)
            trainer.train_dataset = trainer.eval_dataset[task]
            trainer.train()
        trainer.save_model()


if __name__ == "__main__":
    start(main, ranks=2)

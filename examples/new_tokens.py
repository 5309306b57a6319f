"""Train the embeddings of new tokens and nothing else, in TRL's SFTTrainer at ZeRO stage 3: two ranks."""

import json
import tempfile
from pathlib import Path

from common import chats, deepspeed_on_cpu, model_and_tokenizer, start, zero

import cl_dist


def main():
    deepspeed_on_cpu()
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = model_and_tokenizer()
        before = len(tokenizer)
        tokenizer.add_tokens(["<order>", "<refund>"])
        model.resize_token_embeddings(len(tokenizer))
        rows = {"rows": [f"{before}-{len(tokenizer) - 1}"]}
        names = [name for name, param in model.named_parameters() if param.shape[0] == len(tokenizer)]
        file = Path(folder, "new_rows.json")
        file.write_text(json.dumps(dict.fromkeys(names, rows)))
        arguments = SFTConfig(
            folder, deepspeed=zero(3), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-2,
            optim="adamw_torch", save_strategy="no", report_to=[], disable_tqdm=True, max_length=256, bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, arguments, train_dataset=chats("billing"), processing_class=tokenizer)
        with cl_dist.continual(trainer, method="given", file=str(file)):
            trainer.train()


if __name__ == "__main__":
    start(main, ranks=2)

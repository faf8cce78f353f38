"""Hugging Face Trainer with an optimizer that needs no learning rate: python examples/hf_trainer.py"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ppsf_dist import RECOMMENDED, ProdigyPlusScheduleFree
from ppsf_dist.integrations.transformers import attach

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="runs/hf_trainer")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config)
# Each row counts upwards by a step of its own.
rows = [(torch.arange(32) * (1 + i % 7) + i) % 64 for i in range(512)]
data = [{"input_ids": row, "labels": row} for row in rows]

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=50,
        save_steps=50,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=data,
    eval_dataset=data[:64],
    optimizer_cls_and_kwargs=(ProdigyPlusScheduleFree, dict(RECOMMENDED)),
)
attach(trainer)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
print(f"loss of the averaged weights: {trainer.evaluate()['eval_loss']:.4f}")
trainer.accelerator.wait_for_everyone()  # gloo's threads that still hold tensors when Python ends abort it
trainer.accelerator.end_training()

"""TRL's SFTTrainer, the real one, which Trainer's callbacks serve as well: whole models and adapters of peft."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ppsf_dist import ProdigyPlusScheduleFree
from ppsf_dist.integrations.transformers import attach

WORDS = 16


def rows() -> Dataset:
    made = [[(start + step * (1 + start % 3)) % WORDS for step in range(8)] for start in range(32)]
    return Dataset.from_dict({"input_ids": made})


def trainer(folder: Path, *, lora: bool = False, **arguments: Any) -> SFTTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        use_cache=False,
    )  # fmt: skip
    words = {f"w{i}": i for i in range(WORDS)}
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w0", pad_token="w1"
    )
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
        "lr_scheduler_type": "constant", "max_grad_norm": 0, "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "seed": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        made = SFTTrainer(
            model=LlamaForCausalLM(config),
            args=SFTConfig(**given | arguments),
            train_dataset=rows(),
            eval_dataset=rows().select(range(8)),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(ProdigyPlusScheduleFree, {"d0": 1e-3}),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        )
    attach(made)
    return made


def train(made: SFTTrainer, **how: Any) -> SFTTrainer:
    with contextlib.redirect_stdout(io.StringIO()):
        made.train(**how)
    return made


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "lora"])
def test_every_saved_model_has_the_loss_of_the_average(lora: bool, tmp_path: Path) -> None:
    made = train(trainer(tmp_path, lora=lora, eval_strategy="steps", eval_steps=2))
    logged = {log["step"]: log["eval_loss"] for log in made.state.log_history if "eval_loss" in log}
    assert set(logged) == {2, 4, 6}
    for step, loss in logged.items():
        saved = tmp_path / f"checkpoint-{step}"
        if lora:
            model: Any = PeftModel.from_pretrained(made.model.get_base_model(), saved, adapter_name=f"of_{step}")
            model.set_adapter(f"of_{step}")
            made.model = made.model_wrapped = model
        else:
            made.model.load_state_dict(LlamaForCausalLM.from_pretrained(saved).state_dict())
        assert made.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    for log in made.state.log_history:
        assert "loss" not in log or {"d", "d_0"} & set(log)


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "lora"])
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(lora: bool, tmp_path: Path) -> None:
    whole = train(trainer(tmp_path / "whole", lora=lora))
    train(trainer(tmp_path / "parts", lora=lora, max_steps=4))
    resumed = train(trainer(tmp_path / "parts", lora=lora), resume_from_checkpoint=True)
    expected = weights_of(whole.model)
    assert expected and resumed.state.global_step == 6
    for name, weights in weights_of(resumed.model).items():
        assert torch.equal(weights, expected[name]), name

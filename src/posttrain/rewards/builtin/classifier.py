"""What a reward model of any source says of an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import UserError


class Classifier:
    """The score of a sequence classifier of transformers' own form, from a directory; its weights in safetensors.

    It reads the prompt as the policy reads it, with the answer behind it. A run of ours is given as
    `init_reward`, and shares the base.

    Args:
        path: the directory, with its tokenizer.
        label: which of several labels is the score.
        batch_size: answers at a time.
    """

    def __init__(self, path: str | None = None, label: int = 0, batch_size: int = 16) -> None:
        if path is None or not (Path(path).expanduser() / "config.json").is_file():
            raise UserError(f"reward.options.classifier.path: {path} is no directory of a classifier (config.json and weights)")
        self.path, self.label, self.batch_size = Path(path).expanduser(), label, batch_size
        self.loaded: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Classifier:
        return self  # it remembers nothing but its weights

    def __call__(self, prompts: list[str], answers: list[str]) -> list[float]:
        from posttrain.devices.out_of_memory import in_parts, in_two

        texts, found = [p + a for p, a in zip(prompts, answers, strict=True)], list[float]()
        for start in range(0, len(texts), self.batch_size):
            for some in in_parts(self._scores, texts[start : start + self.batch_size], in_two, "the classifier"):
                found += some
        return found

    def _scores(self, texts: list[str]) -> list[float]:
        import torch

        tokenizer, model = self._model()
        read = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, add_special_tokens=False).to(model.device)
        with torch.no_grad():
            return model(**read).logits[:, self.label].float().tolist()

    def _model(self) -> Any:
        if self.loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(self.path)
            model: Any = AutoModelForSequenceClassification.from_pretrained(self.path, use_safetensors=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            if model.config.pad_token_id is None:
                model.config.pad_token_id = tokenizer.pad_token_id
            self.loaded = tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return self.loaded


REWARD = Classifier

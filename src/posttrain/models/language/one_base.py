"""Results one after another, each as if it were alone: adapters that fit on the base in memory do without another load."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from posttrain.models.language.loading import LoadedModel, base_digest, device_here, load_model
from posttrain.models.language.run_data import data_of
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.peft.attach import NEW, put_beside
from posttrain.models.peft.kinds import leaves_the_base
from posttrain.models.peft.tokens import size_of
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.earlier import same_base

Load = Callable[[str, Mapping[str, str]], LoadedModel]  # a run, settings of `data` in place of its own
_OF_OTHER_SHAPE = ("modules_to_save", "target_parameters", "trainable_token_indices")


def one_load(run: str, words: Mapping[str, str]) -> LoadedModel:
    """A run's result alone."""
    return load_model(run, device_here(), words=words)


class OneBase:
    """A `Load` that keeps the last base: a plain LoRA on it, in the same precision, is put beside the adapters that are there."""

    def __init__(self) -> None:
        self._last: LoadedModel | None = None
        self._adapters: dict[str, str] = {}  # run -> as peft knows its adapter

    def __call__(self, run: str, words: Mapping[str, str]) -> LoadedModel:
        """A run's result. What was returned before is then no longer that run's."""
        artifact = open_artifact(run, "run").supported()
        if self._last is None or not _share(artifact, self._last.artifact):
            self._last = None  # let go of before the next one is loaded
            self._last = one_load(run, words)
            self._adapters = {run: NEW}
            return self._last
        model = self._last.model
        if run not in self._adapters:
            data_of(artifact, words)
            name = f"beside_{len(self._adapters)}"
            put_beside(model, artifact.verified().weights, name)
            self._adapters[run] = name
        model.set_adapter(self._adapters[run])
        return LoadedModel(artifact, model.eval(), load_tokenizer(artifact.tokenizer, None, None, None), words)


def _share(a: Artifact, b: Artifact) -> bool:
    """Are both plain LoRAs, on the same base, held and computed in the same way?"""
    if not (_is_plain(a) and _is_plain(b)):
        return False
    both = [(each.manifest.dtype if each.manifest else "", each.quantization) for each in (a, b)]
    return both[0] == both[1] and same_base(base_digest(a), base_digest(b))


def _is_plain(artifact: Artifact) -> bool:
    if artifact.kind != "adapter" or artifact.adapter.peft_type != "LORA" or size_of(artifact.weights):
        return False
    return leaves_the_base(artifact.adapter.whole) and not any(artifact.adapter.whole.get(key) for key in _OF_OTHER_SHAPE)

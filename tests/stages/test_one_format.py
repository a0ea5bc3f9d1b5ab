"""One format for one chain: texts are rendered alike in sft, dpo and ppo, each from the run before, or it is said."""

import json
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.commands.preview.preview import make_preview
from posttrain.errors import UserError

pytestmark = pytest.mark.slow

ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": f"question {k}", "completion": f"answer {k}"} for k in range(6)],
    "dpo": [{"prompt": f"question {k}", "chosen": f"answer {k}", "rejected": "no"} for k in range(6)],
    "ppo": [{"prompt": f"question {k}"} for k in range(6)],
}
SHOWN = {"none": "question 0", "chat": "<|im_start|>user\\nquestion 0<|im_end|>\\n<|im_start|>assistant\\n"}
SMALL = ("model=tiny", "+peft=lora", "peft.r=2", "train.max_steps=1", "train.batch_size=2", "data.eval_share=0", "eval.sets=null")
PPO = ("reward.function=posttrain.rewards:brevity", "ppo.advantage=rloo", "ppo.samples=2", "rollout.max_new_tokens=4")


def words_of(folder: Path, stage: str, *more: str) -> list[str]:
    (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]))
    return [*SMALL, *(PPO if stage == "ppo" else ()), f"data.path={folder}/{stage}.jsonl", *more]


@pytest.mark.parametrize("template", ["none", "chat"])
def test_a_chain_has_one_format(tmp_path: Path, template: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first stage says it; the others take it from the run that they start from."""
    other = {"none": "chat", "chat": "none"}[template]
    before = [f"data.template={template}"]
    for stage in ("sft", "dpo", "ppo"):
        words = words_of(tmp_path, stage, *before)
        (shown,) = [line for line in make_preview(stage, words, None, 1).lines if "the first row" in line]
        assert shown.split("[[trained]]: ")[1].split("[[")[0] == SHOWN[template]
        capsys.readouterr()
        posttrain.run(stage, *words, f"run.dir={tmp_path}/{stage}")
        said = " ".join(capsys.readouterr().out.split())
        assert " ".join(SHOWN[template].split()) in said and "warning: the rows are rendered" not in said
        told = json.loads((tmp_path / stage / "manifest.json").read_text())["template"]
        assert told == {"rows": template, "texts": template}
        if stage != "sft":
            warned = make_preview(stage, [*words, f"data.template={other}"], None, 1).lines
            assert any(
                line.endswith(f"data.template={template} renders prompts that are texts as init has them") for line in warned
            )
        before = [f"init={tmp_path}/{stage}"]


def test_a_run_that_is_rendered_otherwise_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    posttrain.run("sft", *words_of(tmp_path, "sft", "data.template=none"), f"run.dir={tmp_path}/sft")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"data\.template: input should be"):
        posttrain.run("dpo", *words_of(tmp_path, "dpo", "data.template=maybe"), f"run.dir={tmp_path}/dpo")
    posttrain.run("dpo", *words_of(tmp_path, "dpo", f"init={tmp_path}/sft", "data.template=chat"), f"run.dir={tmp_path}/dpo")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: the rows are rendered by the chat template, those of init as plain text; data.template=none" in said

"""What must never happen: code that comes with data, files outside of a directory, secrets in what is written."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import posttrain
from posttrain.commands.plan.plan import make_plan
from posttrain.commands.sample import read_result
from posttrain.config.compose import compose_run
from posttrain.errors import Stopped, UserError
from posttrain.launch.exit_codes import guarded
from posttrain.models.diffusion.pipelines import find_pipeline, pipeline_directory
from posttrain.models.language.loading import load_model
from posttrain.reports.compare_page import compare_page
from posttrain.runs.files import write_json
from posttrain.runs.manifest import read_manifest
from posttrain.secrets import _SHAPES, HIDDEN, redact

CHECKOUT = Path(__file__).parents[1]
TINY = ["model=tiny", "+peft=lora", "peft.r=4", "train.max_steps=2", "data.max_rows=30", "eval.rows=1", "data.eval_rows=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("security") / "run"
    posttrain.run("sft", *TINY, f"run.dir={run}")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("EXPLODED").write_text, ("by a pickle",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.pt", "extra.pkl"])
def test_a_pickle_beside_the_weights_is_refused(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    (run / "adapter" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=f"{name} may be a pickle"):
        posttrain.run("sft", *TINY, f"init={run}", f"run.dir={run.parent / 'next'}")
    with pytest.raises(UserError, match=f"{name} may be a pickle"):
        load_model(run)
    assert not Path("EXPLODED").exists()


def test_a_pickle_in_place_of_every_file_of_a_run_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    stopped = run.parent / "stopped"
    with pytest.raises(Stopped):
        posttrain.run("sft", *TINY, f"run.dir={stopped}", "run.stop_after=1")
    used = [file for file in (run / "adapter").glob("*") if file.name != "README.md"]  # the card is for people; nothing reads it
    read = [*used, run / "manifest.json", run / "config.yaml"]
    resumed = [*(stopped / "checkpoints" / "step-000001").glob("*"), stopped / "config.yaml"]
    for file in (*read, *resumed):
        kept = file.read_bytes()
        file.write_bytes(pickle.dumps(Bomb()))
        words = [f"init={run}", f"run.dir={run.parent / 'next'}"] if file in read else [f"run.dir={stopped}"]
        with pytest.raises(UserError):
            posttrain.run("sft", *TINY, *words)
        shutil.rmtree(run.parent / "next", ignore_errors=True)
        file.write_bytes(kept)
    assert not Path("EXPLODED").exists() and len(read) >= 7 and len(resumed) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["weights"].update(path="../elsewhere"), "weights.kind or weights.path"),
        (lambda m: m["weights"].update(path="/etc"), "weights.kind or weights.path"),
        (lambda m: m["files"].update({"../../secret": "0"}), "files has '../../secret'"),
        (lambda m: m["files"].update({"adapter/x": 5}), "files has 'adapter/x'"),
        (lambda m: m.update(metrics={"eval/loss": "low"}), "metrics.eval/loss is no number"),
        (lambda m: m.pop("config_digest"), "config_digest is missing"),
        (lambda m: m.update(parents={}), "parents is dict, not list"),
    ],
)  # fmt: skip
def test_a_manifest_names_nothing_outside_of_its_directory(change: Any, words: str, run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=words):
        read_manifest(run)


def test_weights_that_were_changed_are_not_loaded(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[0]] += 1.0
    save_file(tensors, file)
    with pytest.raises(UserError, match="its sha256 is not the one in the run's manifest"):
        load_model(run)


@pytest.mark.parametrize("revision", ["null", "main", "v1.0", "0123abc"])
def test_code_from_the_hub_needs_a_commit(revision: str) -> None:
    words = ["model.name=org/model", "model.trust_remote_code=true", f"model.revision={revision}"]
    with pytest.raises(UserError, match=r"model.trust_remote_code: .* a commit of 40 hex digits"):
        compose_run("sft", words)
    assert compose_run("sft", [*words[:2], f"model.revision={'a1' * 20}"])["model"]["trust_remote_code"] is True


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"_class_name": ["mine", "Evil"]}, "_class_name"),
        ({"unet": ["mine", "Evil"]}, "unet"),
        ({"more": ["mine", "Evil"]}, "more"),
        ({"scheduler": ["subprocess", "Popen"]}, "scheduler"),
        ({"custom_pipeline": "mine"}, "custom_pipeline"),
        ({"safety_checker": ["mine", "Evil"]}, None),  # which is left out, and so is its code
    ],
)
def test_code_beside_a_pipeline_is_never_run(
    change: dict[str, Any], part: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to train, nor to plan, nor to draw, though it could be imported."""
    pipeline = shutil.copytree(pipeline_directory(find_pipeline("tiny", None)), tmp_path / "pipeline")
    for folder in (pipeline, *(path for path in pipeline.iterdir() if path.is_dir())):
        for name in ("mine", "pipeline"):
            (folder / f"{name}.py").write_text("open('EXPLODED', 'w').close()\nclass Evil:\n    pass\n")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, **change}))
    monkeypatch.chdir(pipeline)
    monkeypatch.syspath_prepend(pipeline)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a.png")
    words = [
        f"model.name={pipeline}",
        f"data.instance_dir={tmp_path / 'photos'}",
        "data.instance_prompt=a sks dog",
        "prior.weight=0",
    ]
    words += ["train.max_steps=1", "sample.images=0", "eval.images=0", f"run.dir={tmp_path / 'run'}"]
    if part is None:
        posttrain.run("dreambooth", *words)
    else:
        said = rf"model.name: '{pipeline}' takes its {part} from code of its own, which is never run"
        for attempt in (
            lambda: posttrain.run("dreambooth", *words),
            lambda: make_plan("dreambooth", words),
            lambda: read_result(pipeline),
        ):
            with pytest.raises(UserError, match=said):
                attempt()
    assert not list(tmp_path.rglob("EXPLODED"))


def test_a_target_in_a_config_is_never_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="_target_"):
        compose_run("sft", ["+optim._target_=os.system", "+optim.command='touch EXPLODED'"])
    (tmp_path / "mine" / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "mine" / "hydra" / "launcher" / "evil.yaml").write_text("_target_: os.system\ncommand: touch EXPLODED\n")
    from posttrain.launch.sweep import run_sweep

    words = [*TINY, "peft.r=2,4", "hydra/launcher=evil", f"run.dir={tmp_path / 'sweep'}"]
    with pytest.raises(UserError, match=r"hydra.launcher._target_: os.system would be run"):
        run_sweep("sft", words, tmp_path / "mine")
    assert not (tmp_path / "EXPLODED").exists()


SECRETS = {
    "HF_TOKEN": "hf_" + "Ab1" * 10,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "wandb",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "MY_PASSWORD": "correct horse battery",
}


@pytest.mark.parametrize(
    "text",
    [f"401 for url https://hub/x?token={SECRETS['HF_TOKEN']}&y", "https://me:pa55word@host/data.jsonl",
     "Authorization: Bearer abcdefgh12345", "sk-" + "a" * 24, "AKIAABCDEFGHIJKLMNOP"],
)  # fmt: skip
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    found = redact(text)
    assert HIDDEN in found and not any(word in found for word in ("hf_Ab1", "pa55word", "abcdefgh12345", "aaaa", "AKIAA"))
    plain = "a plain line about the token count 12345678, http://host/a:b@c and key=value"
    assert redact(plain) == plain


def test_no_secret_of_the_environment_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by a run, nor in an error that has it in an address."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    posttrain.run("sft", *TINY, f"run.dir={run}")
    write_json(run / "note.json", {"seen": list(SECRETS.values())})

    def fails() -> None:
        raise UserError(f"data.path: cannot reach https://user:{SECRETS['MY_PASSWORD']}@host with {SECRETS['HF_TOKEN']}")

    guarded(fails)
    said = capsys.readouterr()
    written = [p for p in run.rglob("*") if p.is_file()]
    assert len(written) > 10
    for value in SECRETS.values():
        assert value not in said.out + said.err
        assert not [p for p in written if value.encode() in p.read_bytes()]


def test_a_secret_in_a_setting_is_refused_without_being_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    for value in (f"https://hub/{SECRETS['HF_TOKEN']}/x.jsonl", "https://me:pa55word@host/x.jsonl", "${oc.env:HF_TOKEN}"):
        with pytest.raises(UserError, match=r"^data.path: holds a token or password") as found:
            posttrain.run("sft", "model=tiny", f"data.path={value}", f"run.dir={tmp_path / 'run'}")
        assert SECRETS["HF_TOKEN"] not in str(found.value) and "pa55word" not in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_script_in_a_run_is_shown_and_not_run(run: Path) -> None:
    """In what comes from data: samples, names of metrics, settings."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    write_json(run / "samples.json", [{"prompt": evil, "answers": [{"step": 0, "label": evil, "text": evil, "reward": 0.5}]}])
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stage"], manifest["metrics"] = "ppo", {**manifest["metrics"], f"eval/{evil}": 1.0, f"eval/{evil}_before": 2.0}
    manifest["data"][0]["source"] = evil
    (run / "manifest.json").write_text(json.dumps(manifest))
    from posttrain.reports.run_page import run_page

    for page in (run_page(run), compare_page([run, run], run.parent / "both.html")):
        text = page.read_text()
        assert "<script>alert" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in (run / "report.html").read_text()


def test_a_secret_in_a_sweep_or_recipe_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.launch.recipe_runner import run_recipe
    from posttrain.launch.sweep import run_sweep

    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    (tmp_path / "r.yaml").write_text("name: r\ndescription: d\nsteps:\n  sft:\n    overrides: ['data.path=${oc.env:HF_TOKEN}']\n")
    for attempt in (
        lambda: run_sweep("sft", [*TINY, "peft.r=2,4", "data.path=${oc.env:HF_TOKEN}", f"run.dir={tmp_path / 'sweep'}"], None),
        lambda: run_recipe(str(tmp_path / "r.yaml"), [f"run.dir={tmp_path / 'recipe'}"], None, False),
    ):
        with pytest.raises(UserError, match=r"data.path: holds a token or password"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.slow
@pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="runs from a checkout only")
def test_no_secret_lies_in_the_repository() -> None:
    """Every text file that git has, but for this one, which is full of what looks like some."""
    listed = subprocess.run(["git", "-C", str(CHECKOUT), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    names = [
        name for name in listed.split("\0") if name and (CHECKOUT / name).is_file() and Path(name).name != "test_security.py"
    ]
    found = []
    for name in names:
        raw = (CHECKOUT / name).read_bytes()
        if b"\0" not in raw[:1024] and (shape := _SHAPES.search(raw.decode("utf-8", "replace"))):
            found.append(f"{name}: {shape[0][:12]}")
    assert len(names) > 300 and not found

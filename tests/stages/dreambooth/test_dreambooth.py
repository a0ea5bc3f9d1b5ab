"""The stage as a user runs it, on a tiny random Stable Diffusion."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.evaluation.test_image_similarity import clip_and_dino

import posttrain
from posttrain.batch import ImagePart
from posttrain.commands.compose import compose_runs
from posttrain.commands.evaluate import evaluate_runs
from posttrain.commands.export.export import export_run
from posttrain.commands.merge import merge_run
from posttrain.commands.sample import sample
from posttrain.errors import Stopped, UserError
from posttrain.evaluation.image_similarity import Similarity
from posttrain.models.diffusion.denoiser import LORA_FILE, read_factors
from posttrain.models.diffusion.families import DiffusionModel
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import sha256

QUIET = ("sample.images=0", "eval.images=0", "prior.inference_steps=2", "prior.images=3")
STEPS = ("train.max_steps=4", "train.batch_size=2")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def words(photos: Path, run: Path | None, *more: str) -> list[str]:
    given = ["model=tiny", f"data.instance_dir={photos}", "data.instance_prompt=a sks dog", "data.class_prompt=a dog"]
    return [*given, *QUIET, *STEPS, *([f"run.dir={run}"] if run else []), *more]


def train(photos: Path, run: Path, *more: str) -> dict[str, Any]:
    return posttrain.run("dreambooth", *words(photos, run, *more))


def weights(run: Path) -> dict[str, torch.Tensor]:
    file = run / "adapter" / LORA_FILE
    return load_file(file if file.exists() else run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def apart(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_run_leaves_adapter_samples_page_and_manifest(photos: Path, tmp_path: Path) -> None:
    options = ("peft=lora", "sample.images=1", "sample.inference_steps=2", "eval.images=2", "train.eval_steps=2", "optim.lr=1e-2")
    manifest = train(photos, tmp_path / "run", *options)
    assert manifest["stage"] == "dreambooth" and manifest["images"] == 4 * 4 and manifest["token"] == "sks"
    assert {"eval/loss", "class/loss", "unrelated/loss", "drift_class/percent"} <= manifest["metrics"].keys()
    assert [s["pictures"] for s in manifest["data"]] == [5, 3]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss_instance", "train/loss_prior"} <= lines[1].keys()
    assert [line["images"] for line in lines if "images" in line] == [4, 8, 12, 16]
    shots = sorted(p.parent.name for p in (tmp_path / "run" / "samples").glob("step-*/0-instance-0.png"))
    assert shots == ["step-000000", "step-000002", "step-000004"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 * 3 and "a sks dog" in page
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(manifest["base"]["path"])
    pipe.load_lora_weights(str(tmp_path / "run" / "adapter"))
    assert "unet" in pipe.get_list_adapters()
    place = export_run(tmp_path / "run", "comfyui", None, "f16", 0.05)
    assert [file.name for file in place.iterdir()] == ["run.safetensors"] and place == tmp_path / "run-comfyui"
    made, factors = load_file(place / "run.safetensors"), read_factors(tmp_path / "run" / "adapter", "run")["unet"]
    assert len(made) == 3 * len(factors) and all(name.startswith("lora_unet_") for name in made)
    layer = next(iter(factors))
    assert torch.equal(made[f"lora_unet_{layer.replace('.', '_')}.lora_up.weight"], factors[layer].b.half())
    with pytest.raises(UserError, match=r"is of a diffusion model, which --to gguf does not take; --to comfyui"):
        export_run(tmp_path / "run", "gguf", None, None, 0.05)
    with pytest.raises(UserError, match="is of a diffusion model; posttrain sample draws with it"):
        evaluate_runs(["tiny", str(tmp_path / "run")])


def test_full_training_leaves_a_pipeline_to_go_on_from(photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path / "a")
    assert (tmp_path / "a" / "model" / "model_index.json").is_file()
    second = train(photos, tmp_path / "b", f"init={tmp_path / 'a'}", "peft=lora")
    assert second["parents"][0]["role"] == "init" and second["base"]["path"] == str(tmp_path / "a" / "model")
    with pytest.raises(UserError, match=r"init: .* is an adapter; merge it first"):
        train(photos, tmp_path / "c", f"init={tmp_path / 'b'}")
    with pytest.raises(UserError, match="is a dreambooth run, which sft cannot start from"):
        posttrain.run("sft", f"init={tmp_path / 'a'}")


@pytest.mark.parametrize("method", [pytest.param("none", marks=pytest.mark.slow), "lora"])
def test_a_batch_of_4_is_four_of_1(method: str, photos: Path, tmp_path: Path) -> None:
    common = (f"peft={method}", "optim.lr=1e-3", "dreambooth.noise_offset=0.1")
    train(photos, tmp_path / "a", "train.batch_size=4", "train.grad_accum=1", *common)
    train(photos, tmp_path / "b", "train.batch_size=1", "train.grad_accum=4", *common)
    assert (
        apart(tmp_path / "a", tmp_path / "b") < 1e-4
    )  # of steps of 1e-3: AdamW makes much of rounding where gradients are small
    train(photos, tmp_path / "c", "train.batch_size=1", "train.grad_accum=4", "train.seed=1", *common)
    assert apart(tmp_path / "a", tmp_path / "c") > 2e-3


@pytest.mark.parametrize("more", [(), ("data.buckets=true", "data.crops=2", "data.flip=true", "dreambooth.min_snr=5")])
def test_what_is_cached_is_what_would_be_computed(more: tuple[str, ...], photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path / "a", "peft=lora", *more)
    train(photos, tmp_path / "b", "peft=lora", "data.cache=false", *more)
    losses = [
        [json.loads(line).get("train/loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in "ab"
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and apart(tmp_path / "a", tmp_path / "b") < 1e-5


def test_nothing_is_encoded_after_the_start(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every latent goes with its own picture's caption, whatever the order."""
    for i in range(5):
        (photos / f"{i}.txt").write_text(f"a sks dog number {i}")
    seen: list[tuple[torch.Tensor, list[str], bool]] = []
    forward = DiffusionModel.forward

    def watched(self: DiffusionModel, part: ImagePart, noisy: torch.Tensor) -> torch.Tensor:
        told = [self.captions[i] for i in part.caption.tolist()]
        assert part.mean is not None and self.pipe.text_encoder is None and self.texts is not None
        seen.extend((part.mean[i], [told[i]], i < part.num_instance) for i in range(len(told)))
        return forward(self, part, noisy)

    monkeypatch.setattr(DiffusionModel, "forward", watched)
    train(photos, tmp_path / "run", "peft=lora", "data.captions=files", "train.max_steps=10")
    by_caption: dict[str, torch.Tensor] = {}
    for mean, (caption,), is_instance in seen:
        assert is_instance == (caption != "a dog")
        if is_instance:
            assert torch.equal(by_caption.setdefault(caption, mean), mean)
    assert len(by_caption) == 5 and len({m.sum().item() for m in by_caption.values()}) == 5
    assert sum(is_instance for _, _, is_instance in seen) == sum(not is_instance for _, _, is_instance in seen) == 20


def test_class_images_are_made_once_and_topped_up(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("train.max_steps=1", "train.seed=77", "peft=lora", "data.class_prompt=a dog of its own")
    train(photos, tmp_path / "a", *more)
    assert "class: drawing 3 pictures" in capsys.readouterr().out
    folder = next(p.parent for p in (cache_root() / "class_images").glob("*/recipe.json") if "of its own" in p.read_text())
    first = {p.name: sha256(p) for p in folder.glob("*.png")}
    train(photos, tmp_path / "b", *more, "prior.images=5")
    assert "drawing 2 pictures of 'a dog of its own', 3 are there already" in capsys.readouterr().out
    after = {p.name: sha256(p) for p in folder.glob("*.png")}
    assert len(after) == 5 and first.items() <= after.items()
    train(photos, tmp_path / "c", *more)
    assert "drawing" not in capsys.readouterr().out
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_folder_of_class_images(photos: Path, tmp_path: Path) -> None:
    manifest = train(photos, tmp_path / "a", f"data.class_dir={photos}", "train.max_steps=1")
    assert manifest["data"][1]["source"] == str(photos) and manifest["data"][1]["pictures"] == 5


def test_lambda_0_makes_no_class_images_and_trains_on_none(photos: Path, tmp_path: Path) -> None:
    manifest = train(photos, tmp_path / "a", "prior.weight=0", "peft=lora")
    assert manifest["images"] == 4 * 2 and len(manifest["data"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert not any("train/loss_prior" in line for line in lines)


@pytest.mark.parametrize("method", [pytest.param("none", marks=pytest.mark.slow), "lora"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(method: str, photos: Path, tmp_path: Path) -> None:
    more = (f"peft={method}", "dreambooth.text_encoder=true", "train.save_steps=null")
    train(photos, tmp_path / "straight", *more)
    with pytest.raises(Stopped):
        train(photos, tmp_path / "stopped", *more, "run.stop_after=1")
    train(photos, tmp_path / "stopped", *more)
    assert apart(tmp_path / "straight", tmp_path / "stopped") == 0.0


@pytest.mark.slow
def test_adapters_take_turns_blend_and_merge(photos: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "second")]
    for seed, run in enumerate(runs):
        train(photos, run, "peft=lora", f"train.seed={seed}", "optim.lr=1e-2", f"peft.r={4 + 4 * seed}")
    files = sample([str(run) for run in runs], ["a sks dog"], tmp_path / "out", 1, 0, 2, None, None)
    assert [f.name for f in files] == ["first-a-sks-dog-0.png", "second-a-sks-dog-0.png"]
    assert files[0].read_bytes() != files[1].read_bytes()
    alone = sample([str(runs[1])], ["a sks dog"], tmp_path / "alone", 1, 0, 2, None, None)
    assert alone[0].read_bytes() == files[1].read_bytes()
    compose_runs([str(runs[0])], tmp_path / "one", [1.0], None)
    again = sample([str(tmp_path / "one")], ["a sks dog"], tmp_path / "alone", 1, 0, 2, None, None)
    assert again[0].read_bytes() == files[0].read_bytes()
    compose_runs([f"0.5*{runs[0]} - {runs[1]}"], tmp_path / "both", None, None)
    parts = [read_factors(run / "adapter", "x")["unet"] for run in (*runs, tmp_path / "both")]
    for layer, both in parts[2].items():
        a, b = (each[layer].b @ each[layer].a for each in parts[:2])
        assert torch.allclose(both.b @ both.a, 0.5 * a - b, atol=1e-6)
    figures = merge_run(runs[0], tmp_path / "merged", 0.05)
    assert figures["difference"] < 1e-5
    merged = sample([str(tmp_path / "merged")], ["a sks dog"], tmp_path / "alone", 1, 0, 2, None, None)
    difference = np.asarray(Image.open(merged[0]), dtype=int) - np.asarray(Image.open(files[0]), dtype=int)
    assert np.abs(difference).max() <= 1
    train(photos, tmp_path / "full", "train.max_steps=1")
    with pytest.raises(UserError, match="is a whole pipeline already"):
        merge_run(tmp_path / "full", tmp_path / "x", 0.05)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.instance_dir=null"], "data.instance_dir: nothing to learn from"),
        (["data.instance_dir=absent"], "data.instance_dir: absent does not exist"),
        (["data.instance_prompt=a dog"], "data.instance_prompt: 'a dog' has no token of its own"),
        (["data.token=zwx"], "data.instance_prompt: 'a sks dog' lacks the token 'zwx'"),
        (
            ["data.class_prompt=null"],
            'data.class_prompt: prior.weight=1 needs one, such as "a dog"; give it, or say prior.weight=0',
        ),
        (["model=smollm2"], "model.name: 'smollm2' is "),
        (["data.size=30"], "data.size: 30 is no multiple of 4, as this model needs it; say data.size=28"),
        (["data.background=whit"], "data.background: 'whit' is no colour"),
        (["data.mask=absent"], "data.mask: absent is no folder"),
        (["peft=prefix"], "peft: prefix is a method of language models"),
        (["peft=lora", "peft.targets=[nothing]"], "peft.targets: no linear layer matches 'nothing'"),
        (["peft=lora", "quant=int8"], "quant=int8 is of language models; say quant=nf4"),
        (["quant=nf4"], "quant=nf4 cannot be trained in full"),
        (["data.captions=files"], "data.captions: 0.png has no 0.txt beside it"),
        (["eval.clip=absent", "sample.images=1"], "eval.clip: absent cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line(more: list[str], said: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        posttrain.run("dreambooth", *words(photos, tmp_path / "run", *more))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_one_corrupt_picture_among_five(photos: Path, tmp_path: Path) -> None:
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"data.instance_dir: 3.png cannot be read .*data.corrupt=skip"):
        train(photos, tmp_path / "a")
    manifest = train(photos, tmp_path / "b", "data.corrupt=skip", "train.max_steps=1", "peft=lora")
    assert manifest["data"][0]["pictures"] == 4 and manifest["left_out"][0].startswith("3.png")


def test_clip_and_dino_of_a_named_model(photos: Path, tmp_path: Path) -> None:
    clip_and_dino(tmp_path)
    named = (f"eval.clip={tmp_path / 'clip'}", f"eval.dino={tmp_path / 'dino'}", "sample.images=1", "sample.inference_steps=2")
    metrics = train(photos, tmp_path / "run", "train.max_steps=1", *named)["metrics"]
    for when in ("", "_before"):
        assert {f"eval/{name}{when}" for name in ("clip_i", "clip_t", "dino")} <= metrics.keys()
    pictures = [Image.open(path) for path in sorted((tmp_path / "run" / "samples" / "step-000001").glob("*instance*.png"))]
    similar = Similarity(str(tmp_path / "clip"), None).measure(pictures, [Image.open(p) for p in sorted(photos.iterdir())], "x")
    assert len(pictures) == 1 and metrics["eval/clip_i"] == pytest.approx(similar["clip_i"], abs=0.02)


@pytest.mark.slow
def test_killed_and_started_again_is_bit_identical(photos: Path, tmp_path: Path) -> None:
    def command(run: Path) -> list[str]:
        more = ("peft=lora", "train.max_steps=30", "train.save_steps=4")
        return [sys.executable, "-m", "posttrain", "dreambooth", *words(photos, run, *more)]

    subprocess.run(command(tmp_path / "straight"), check=True, capture_output=True)
    run = tmp_path / "killed"
    child = subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while child.poll() is None and not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (run / "manifest.json").exists(), "the kill came too late to mean anything"
    ended = subprocess.run(command(run), capture_output=True, text=True)
    assert ended.returncode == 0 and "going on from step" in ended.stdout
    assert sha256(run / "adapter" / LORA_FILE) == sha256(tmp_path / "straight" / "adapter" / LORA_FILE)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if 0 < s < 30] == list(range(1, 30))

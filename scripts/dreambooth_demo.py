"""`make demo-dreambooth`: a small text-to-image model from scratch on pictures that the project draws, then one new individual of
one class from five pictures, four ways: in full and by LoRA, with and without prior preservation. Each step is done once.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import posttrain
from drawn import CLASSES, individual
from drawn_model import TOKEN, Judge, train_base, train_judge
from posttrain.commands.sample import read_result
from posttrain.console import say
from posttrain.models.diffusion.denoiser import load_adapter
from posttrain.models.diffusion.families import encode_texts, negative_texts
from posttrain.models.diffusion.image_generation import Drawing, draw
from posttrain.models.diffusion.pipelines import load_pipeline
from posttrain.reports.pages import write_page
from posttrain.reports.sample_grids import as_uri

INSTANCE, CLASS = f"a {TOKEN} car", "a car"
PROMPTS = (INSTANCE, CLASS, *(f"a {kind}" for kind in CLASSES if kind != "car"))
WAYS = {
    "full, no prior": ["optim.lr=1e-4", "prior.weight=0"],
    "full, prior": ["optim.lr=1e-4"],
    "LoRA, no prior": ["+peft=lora", "optim.lr=2e-3", "prior.weight=0"],
    "LoRA, prior": ["+peft=lora", "optim.lr=2e-3"],
}
HOW = Drawing(32, 32, 15, 1.5, 24)
COUNT, SHOWN = 24, 6  # pictures of each prompt that are judged, and shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/dreambooth_demo"))
    parser.add_argument("--steps", type=int, default=120, help="of each of the four")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if not (out / "base" / "model_index.json").exists():
        train_base(out / "base")
    say(f"a text-to-image model: {out / 'base'}")
    photos = out / "photos"
    photos.mkdir(exist_ok=True)
    rng = random.Random(5)
    for i in range(5):
        individual(rng).save(photos / f"{i}.png")
    judge, accuracy = train_judge()
    say(f"a judge of pictures, right on {accuracy:.1%} of new drawn ones")
    runs = {"before": str(out / "base")} | {way: personalise(way, words, out, args.steps) for way, words in WAYS.items()}
    found = {way: measure(run, judge) for way, run in runs.items()}
    write_outcome(found, runs, accuracy, photos, out, time.monotonic() - began)


def personalise(way: str, words: list[str], out: Path, steps: int) -> str:
    directory = out / way.lower().replace(", ", "-").replace(" ", "-")
    words = [
        *words,
        f"model.name={out / 'base'}",
        f"data.instance_dir={out / 'photos'}",
        f"data.instance_prompt={INSTANCE}",
        f"data.class_prompt={CLASS}",
        "data.flip=true",
        f"train.max_steps={steps}",
        f"train.eval_steps={steps // 3}",
        "train.batch_size=4",
        f"sample.unrelated=[{','.join(PROMPTS[2:])}]",
        "sample.guidance=1.5",
        "sample.inference_steps=15",
        "prior.guidance=1",
        f"run.dir={directory}",
    ]
    posttrain.run("dreambooth", *words)
    return str(directory)


def measure(run: str, judge: Judge) -> dict[str, Any]:
    """Prompt -> what the judge sees in pictures of it, and some of them."""
    result = read_result(run)
    pipe = load_pipeline(result.base, torch.float32)
    if result.weights:
        load_adapter(pipe, result.weights, "run")
    texts, negative = encode_texts(pipe, PROMPTS), negative_texts(pipe)
    found = {}
    for row, prompt in enumerate(PROMPTS):
        rows = {name: value[row : row + 1].expand(COUNT, *value.shape[1:]) for name, value in texts.items()}
        images = draw(pipe, rows, negative, list(range(COUNT)), HOW)
        found[prompt] = {"shares": judge.shares(images), "images": images[:SHOWN]}
    return found


def figures(found: dict[str, Any], prompt: str) -> dict[str, float]:
    """The share of pictures that show the individual, and that show what was asked for."""
    shares = found[prompt]["shares"]
    return {"individual": shares["individual"], "asked": shares["individual" if TOKEN in prompt else prompt.split()[-1]]}


def write_outcome(found: dict[str, Any], runs: dict[str, str], accuracy: float, photos: Path, out: Path, seconds: float) -> None:
    """report.html, demo.json and demo.png in `out`; the table is said too."""
    rows = []
    for way, each in found.items():
        others = [figures(each, prompt)["individual"] for prompt in PROMPTS[2:]]
        metrics = json.loads((Path(runs[way]) / "manifest.json").read_text())["metrics"] if way != "before" else {}
        rows.append(
            {
                "way": way,
                "fidelity": figures(each, INSTANCE)["individual"],
                "class_drift": figures(each, CLASS)["individual"],
                "class_kept": figures(each, CLASS)["asked"],
                "other_drift": sum(others) / len(others),
                "others_kept": sum(figures(each, prompt)["asked"] for prompt in PROMPTS[2:]) / len(others),
                "class_loss": metrics.get("drift_class/percent"),
                "others_loss": metrics.get("drift_unrelated/percent"),
            }
        )
    (out / "demo.json").write_text(json.dumps({"judge_accuracy": accuracy, "seconds": seconds, "rows": rows}, indent=2))
    sheet = picture_sheet(found, photos)
    sheet.save(out / "demo.png")
    for row in rows:
        shows = f"'{INSTANCE}' {row['fidelity']:.1%}, '{CLASS}' {row['class_drift']:.1%}"
        say(f"{row['way']:<15} pictures that show the individual: {shows}")
    grids = [(way, [[uri(image) for image in each[prompt]["images"]] for prompt in PROMPTS]) for way, each in found.items()]
    page = write_page(
        out / "report.html",
        "demo_dreambooth.html",
        title="DreamBooth on drawn pictures",
        kicker="demo",
        heading="One car from five pictures, four ways",
        state="done",
        lead=f"full training and LoRA, with and without prior preservation; the prompts are {', '.join(PROMPTS)}",
        rows=rows,
        accuracy=accuracy,
        count=COUNT,
        prompts=PROMPTS,
        photos=[as_uri(file) for file in sorted(photos.glob("*.png"))],
        grids=grids,
        instance=INSTANCE,
        class_prompt=CLASS,
    )
    say(f"page {page}   in {seconds / 60:.0f} min")


def uri(image: Image.Image) -> str:
    import base64
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_sheet(found: dict[str, Any], photos: Path) -> Image.Image:
    """The photos, then a row a way: pictures of the individual, its class and two other things."""
    side, gap, left, shown, columns = 64, 4, 110, (INSTANCE, CLASS, *PROMPTS[2:4]), 4
    block = columns * (side + gap) + 3 * gap
    sheet = Image.new("RGB", (left + len(shown) * block, (1 + len(found)) * (side + 2 * gap) + 5 * gap), "white")
    brush = ImageDraw.Draw(sheet)

    def put(image: Image.Image, x: int, y: int) -> None:
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))

    brush.text((gap, gap + side // 2), "the photos", "black")
    for i, file in enumerate(sorted(photos.glob("*.png"))):
        put(Image.open(file), left + i * (side + gap), gap)
    for column, prompt in enumerate(shown):
        brush.text((left + column * block, side + 3 * gap), prompt, "black")
    for row, (way, each) in enumerate(found.items(), 1):
        top = row * (side + 2 * gap) + 5 * gap
        brush.text((gap, top + side // 2), way, "black")
        for column, prompt in enumerate(shown):
            for i, image in enumerate(each[prompt]["images"][:columns]):
                put(image, left + column * block + i * (side + gap), top)
    return sheet


if __name__ == "__main__":
    main()

"""What a run shows of itself: a line a step for a person, `metrics.jsonl` for programs, `loss.png` at the end."""

import json
import math
import os
import sys

from PIL import Image, ImageDraw

LINE = "step {step}/{total}  loss {loss:.4f}  gradient norm {grad_norm:.4g}  {tokens_per_s:.0f} tokens/s  {left} left"
WIDTH, HEIGHT, MARGIN = 900, 500, 60  # of loss.png, in pixels


class Metrics:
    """`metrics.jsonl` in the folder `out`, one JSON object a line. Only one rank writes."""

    def __init__(self, out: str, after_step: int):
        """Lines after `after_step` are of steps that a resumed run takes again; they go."""
        self.path = os.path.join(out, "metrics.jsonl")
        self.lines = [line for line in read_lines(self.path) if line["step"] <= after_step]
        with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        os.replace(f"{self.path}.partial", self.path)

    def write(self, line: dict) -> None:
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def show(self, step: int, total: int) -> None:
        """The step that was just written, on stderr."""
        steps = [line for line in self.lines if "loss" in line][-20:]
        seconds = sum(line["step_s"] for line in steps) / len(steps) * (total - step)
        left = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else None
        print(LINE.format(**steps[-1], total=total, left=left or f"{seconds:.0f} s"), file=sys.stderr, flush=True)


def read_lines(path: str) -> list[dict]:
    """The whole lines of a file of JSON objects; the last may have been cut off with the process that wrote it."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def draw_loss(path: str, lines: list[dict]) -> None:
    """A picture of the loss (blue) and the validation loss (orange) by step."""
    curves = [
        ("loss", "#1f77b4", [(line["step"], line["loss"]) for line in lines if "loss" in line]),
        ("val_loss", "#ff7f0e", [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]),
    ]
    points = [point for _, _, curve in curves for point in curve]
    last = max(2, *(step for step, _ in points))
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    unit = 10 ** math.floor(math.log10(max(high - low, 1e-3)))  # of the grid
    unit *= next(k for k in (0.2, 0.5, 1, 2) if (high - low) / (k * unit) <= 7)
    low, high = math.floor(low / unit) * unit, (math.floor(high / unit) + 1) * unit

    def place(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - 1) / (last - 1) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for i in range(round((high - low) / unit) + 1):
        (left, y), (right, _) = place(1, low + i * unit), place(last, low + i * unit)
        draw.line((left, y, right, y), fill="#dddddd")
        draw.text((left - 8, y), f"{low + i * unit:.4g}", fill="black", anchor="rm")
    for step in sorted({1 + round(i * (last - 1) / 5) for i in range(6)}):
        draw.text((place(step, low)[0], HEIGHT - MARGIN + 8), str(step), fill="black", anchor="mt")
    draw.text((WIDTH / 2, HEIGHT - 20), "step", fill="black", anchor="mm")
    for i, (name, color, curve) in enumerate(curves):
        if curve:
            xy = [place(*point) for point in curve]
            draw.line(xy, fill=color, width=2)
            for x, y in xy if len(xy) < 40 else ():
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
            draw.text((WIDTH - MARGIN, 20 + 16 * i), name, fill=color, anchor="rm")
    image.save(f"{path}.partial", format="PNG")
    os.replace(f"{path}.partial", path)

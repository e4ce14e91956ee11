"""The picture of a run's loss, `loss.png`."""

from PIL import Image, ImageDraw

from runtime.files import writing

WIDTH, HEIGHT, MARGIN = 900, 500, 60  # pixels


def points_of(lines: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) for the finite values of a column of `metrics.jsonl`."""
    numbers = [(line["step"], line[name]) for line in lines if type(line.get(name)) in (int, float)]
    return [(step, value) for step, value in numbers if abs(value) < 1e30]


def draw_loss(path: str, lines: list[dict]) -> None:
    """Draw the loss by step (blue), and the validation loss (orange). Raises UserError."""
    losses, validations = points_of(lines, "loss"), points_of(lines, "val_loss")
    steps, values = zip(*(losses + validations or [(1, 0.0)]))
    last, low, high = max(2, *steps), min(values), max(values)
    high = max(high, low + 1e-3 * max(1, abs(low)))

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - 1) / (last - 1) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((*at(1, high), *at(last, low)), outline="#dddddd")
    for loss in (low, high):
        draw.text(at(1, loss), f"{loss:.4g} ", fill="black", anchor="rm")
    draw.text(at(last, low), f"\nstep {last}", fill="black")
    for color, points in {"#1f77b4": losses, "#ff7f0e": validations}.items():
        places = [at(*point) for point in points]
        draw.line(places, fill=color, width=2)
        for place in places[-1:]:  # one point alone makes no line
            draw.circle(place, 3, fill=color)
    draw.text((MARGIN, 12), "loss of each step (blue), validation loss (orange)", fill="black")
    with writing(path):
        image.save(path)

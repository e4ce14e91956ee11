"""The picture of a run's loss, `loss.png`."""

from PIL import Image, ImageDraw

from runtime.files import writing

WIDTH, HEIGHT, MARGIN = 900, 500, 60  # pixels

SMOOTHING = 0.9  # each step's weight in the smoothed loss shrinks by this factor with every later step

Points = list[tuple[int, float]]  # (step, loss)


def points_of(lines: list[dict], name: str) -> Points:
    """The finite values of a column of `metrics.jsonl`."""
    numbers = [(line["step"], line[name]) for line in lines if type(line.get(name)) in (int, float)]
    return [(step, value) for step, value in numbers if abs(value) < 1e30]


def smoothed(points: Points) -> Points:
    """An exponential moving average, divided by the weight so far (as in Adam): the first steps don't lean to 0."""
    result, mean, weight = [], 0.0, 0.0
    for step, loss in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + 1 - SMOOTHING
        result.append((step, mean / weight))
    return result


def draw_loss(path: str, lines: list[dict]) -> None:
    """Draw the loss by step (pale), smoothed (blue), and the validation loss (orange). Raises UserError."""
    losses = points_of(lines, "loss")
    curves = [("loss", "#b5d3ea", losses), ("loss, smoothed", "#1f77b4", smoothed(losses))]
    curves.append(("validation loss", "#ff7f0e", points_of(lines, "val_loss")))
    steps, values = zip(*(losses + curves[-1][2] or [(1, 0.0)]))
    last, low, high = max(2, *steps), min(values), max(values)
    high = max(high, low + 1e-3 * max(1, abs(low)))

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (step - 1) / (last - 1) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for i in range(5):
        step, loss = 1 + (last - 1) * i / 4, low + (high - low) * i / 4
        left, bottom, y = *at(1, low), at(1, loss)[1]
        draw.line((left, y, WIDTH - MARGIN, y), fill="#dddddd")
        draw.text((left - 8, y), f"{loss:.4g}", fill="black", anchor="rm")
        draw.text((at(step, low)[0], bottom + 8), f"step {step:.0f}", fill="black", anchor="mt")
    for i, (name, color, points) in enumerate(curves):
        places = [at(*point) for point in points]
        draw.line(places, fill=color, width=2)
        for x, y in places[-1:]:  # one point alone makes no line
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        draw.text((WIDTH - MARGIN, 12 + 14 * i), name, fill=color, anchor="rm")
    with writing(path):
        image.save(path)

"""What every model checks of its options."""

from __future__ import annotations

__all__ = ["check_image_size", "check_probability", "check_sizes"]


def check_sizes(model: str, **sizes: int) -> None:
    """Raise a `ValueError` that names the first size below 1."""
    for option, size in sizes.items():
        if size < 1:
            raise ValueError(f"{model}: {option} must be at least 1, got {size}")


def check_probability(model: str, **probabilities: float) -> None:
    """Raise a `ValueError` that names the first dropout outside [0, 1)."""
    for option, probability in probabilities.items():
        if not 0 <= probability < 1:
            raise ValueError(f"{model}: {option} is a probability in [0, 1), got {probability}")


def check_image_size(model: str, image_size: int, *, at_least: int) -> None:
    """Raise a `ValueError` for images with too few pixels for the model's pooling."""
    if image_size < at_least:
        raise ValueError(f"{model}: image_size must be at least {at_least}, got {image_size}")

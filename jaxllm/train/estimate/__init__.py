"""What a training step needs of a device, by formulas, and what would make it fit."""

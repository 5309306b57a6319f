"""Half fine-tuning: a random half of the matrices is frozen in every task."""

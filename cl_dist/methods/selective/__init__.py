"""What methods share that choose once per task which part of the weights is trained."""

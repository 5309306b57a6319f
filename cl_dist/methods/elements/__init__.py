"""What methods share that choose in every step, once the gradients are reduced, which elements are updated."""

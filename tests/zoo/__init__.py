"""Every family of models that users bring, built tiny: trained, exported and loaded by plain transformers and peft."""

"""The layouts of LoRA files: one reader for all of them, one writer for each."""

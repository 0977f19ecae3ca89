"""Recognise LoRA files of diffusers, kohya and MLX, and translate them to PEFT."""

"""sssd_fast: SSSD-COVID (masked autoencoder with self-distillation) pre-training, fine-tuning and evaluation on CT slices."""

__version__ = "0.1.0"

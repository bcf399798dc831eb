"""What a training or an inference needs beyond MONAI's engines."""

"""What one machine is, without torch: software, GPUs, fabric, limits, storage. For doctor and pre-flight."""

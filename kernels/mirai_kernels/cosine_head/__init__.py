"""The predictor's last projection and its cosine to the target, without the projected features in memory."""

"""H3Fusion: helpful, harmless and honest experts fused over one shared base model."""

import os
import warnings

# progress is written as plain lines (io.Progress); the libraries' bars would fill a log
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# peft and transformers speaking to each other
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

"""Callbacks for training frameworks: each in a module of its own, which needs that framework.

- `streamlens.integrations.lightning.StreamlensCallback` for the `Trainer` of PyTorch Lightning
- `streamlens.integrations.transformers.StreamlensCallback` for the `Trainer` of Hugging Face

A loop with an `accelerate.Accelerator` needs none: observe the model before or after `prepare()`.
"""

"""Front ends: Hugging Face folders, torch modules and exported programs become graphs of `mimo` ops."""

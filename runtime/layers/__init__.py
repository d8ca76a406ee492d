"""What a model is made of; each layer owns its weights and the kernel chosen for them."""

"""Image tokenizers, which encode pictures as codes or latent patches and decode them again.

autoencoder   what all image tokenizers share, and the codes of a diffusers VQModel
transformers  the codes of Emu3 and Janus, whose models are in the library transformers
kl            the latent patches of a diffusers AutoencoderKL
training      trains small VQ and KL autoencoders
"""

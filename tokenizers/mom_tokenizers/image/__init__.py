"""Image tokenizers, which encode pictures as codes or latent patches and decode them again.

autoencoder   what all image tokenizers share, and the codes of a diffusers VQModel
transformers  the codes of Emu3 and Janus, whose models are in the library transformers
kl            the latent patches of any autoencoder of latent_models
latent_models the classes of latent autoencoders in diffusers, and what distinguishes them
training      trains small VQ and KL autoencoders
pretrained    takes a published latent autoencoder, and measures its round trip
"""

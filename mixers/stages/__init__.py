"""The stages that mixers are composed of: projections, convolutions, decays, rotary embeddings, outputs."""
